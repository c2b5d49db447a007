"""Squeeze and excitation: one gate per channel at the end of each branch (Hu et al. 2018)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from resnet_paths.zoo.resnet import PreactBasicBlock, PreactResNet

__all__ = ["SEResNet"]


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a gate in (0, 1), computed from the means of all channels by two linear layers.

    The hidden layer has a quarter of the channels, since the reduction by 16 of Hu et al. would leave one unit of 16.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 4)
        self.excite = nn.Linear(channels // 4, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, H, W] to the same shape."""
        gates = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gates[:, :, None, None]


class SEBlock(PreactBasicBlock):
    """Pre-activation block whose branch ends in squeeze and excitation; the skip has no gate."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.gate = SqueezeExcitation(channels)

    def branch(self, activated: torch.Tensor) -> torch.Tensor:
        """The residual function of the pre-activation."""
        gated: torch.Tensor = self.gate(super().branch(activated))
        return gated


class SEResNet(PreactResNet):
    """Pre-activation ResNet with squeeze and excitation in every branch (Hu et al. 2018).

    Its 3n blocks of two convolutions are those of `resnet_paths.zoo.resnet.PreactResNet`; the gates' linear layers are
    not counted in the depth 6n + 2.
    """

    basic_block = SEBlock

"""VGG-like network without skips: the control of Veit et al. 2016, figure 3."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["VGG"]


class VGGLayer(nn.Module):
    """3x3 convolution and ReLU, preceded by 2x2 max pooling if `pools`."""

    def __init__(self, in_channels: int, channels: int, *, pools: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.pools = pools

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, H, W] to [batch, channels, H, W], or half of H and W."""
        return F.relu(self.conv(F.max_pool2d(x, 2) if self.pools else x))


class VGG(nn.Module):
    """VGG-like network of 15 layers without skips and without BatchNorm (Veit et al. 2016, figure 3).

    Fourteen 3x3 convolutions with ReLU, each a block without skip, so that there is one path. Five have 32 channels at
    full, five 64 at half and four 128 at quarter resolution, followed by the spatial mean and a linear layer. The
    eleven blocks that keep the shape can be deleted.

    Args:
        in_channels: Channels of the image.
        num_classes: Number of logits.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.layer1 = _stage(in_channels, 32, 5, pools=False)
        self.layer2 = _stage(32, 64, 5, pools=True)
        self.layer3 = _stage(64, 128, 4, pools=True)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, H, W]."""
        logits: torch.Tensor = self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits

    def initialise(self, generator: torch.Generator) -> None:
        """He initialisation with fan-in: without BatchNorm, fan-out would reduce the variance of the logits by 100."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)


def _stage(in_channels: int, channels: int, num_layers: int, *, pools: bool) -> nn.Sequential:
    first = VGGLayer(in_channels, channels, pools=pools)
    return nn.Sequential(first, *(VGGLayer(channels, channels, pools=False) for _ in range(num_layers - 1)))

"""CIFAR-style networks of 6n+2 (or 9n+2) layers: pre- and post-activation ResNets, and plain nets without skips.

Three stages at full, half and quarter resolution with 16, 32 and 64 channels (He et al. 2016a, section 4.2).
They are ordinary modules without any support for `resnet_paths.unravel`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["OptionAPreactResNet", "PlainNet", "PreactResNet", "ResNet"]


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class PreactBasicBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions (He et al. 2016b, figure 4e).

    Where the shape changes, the skip is a 1x1 convolution of the shared pre-activation.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        changes_shape = stride != 1 or in_channels != channels
        self.projection = _conv(in_channels, channels, 1, stride) if changes_shape else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, H, W] to [batch, channels, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        return self.skip(x, activated) + self.branch(activated)

    def skip(self, x: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        """The skip: the input, or the projection of its pre-activation."""
        return x if self.projection is None else self.projection(activated)

    def branch(self, activated: torch.Tensor) -> torch.Tensor:
        """The residual function of the pre-activation."""
        branch: torch.Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return branch


class PreactOptionABlock(PreactBasicBlock):
    """Pre-activation block whose skip has no parameters (option A of He et al. 2016a), as in Veit et al. 2016.

    Where the shape changes, the skip is the average of 2x2 pixels of the input with appended channels of zeros.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.projection = None
        self.stride = stride
        self.new_channels = channels - in_channels

    def skip(self, x: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        """The input, averaged and with channels of zeros where the shape changes."""
        if self.stride != 1:
            x = F.avg_pool2d(x, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels)) if self.new_channels else x


class PreactBottleneckBlock(nn.Module):
    """Pre-activation block of a 1x1, a 3x3 and a 1x1 convolution (He et al. 2016b)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = _conv(channels, out_channels, 1)
        changes_shape = stride != 1 or in_channels != out_channels
        self.projection = _conv(in_channels, out_channels, 1, stride) if changes_shape else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, H, W] to [batch, 4 * channels, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        skip = x if self.projection is None else self.projection(activated)
        hidden = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        branch: torch.Tensor = self.conv3(F.relu(self.bn3(hidden)))
        return skip + branch


class BasicBlock(nn.Module):
    """Post-activation block of two 3x3 convolutions with BatchNorm (He et al. 2016a, figure 2).

    Where the shape changes, the skip takes every second row and column and appends channels of zeros (option A, without
    parameters).
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, H, W] to [batch, channels, H / stride, W / stride]."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + branch)


class PlainBlock(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm and ReLU, and no skip."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, H, W] to [batch, channels, H / stride, W / stride]."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def _stages(block: Callable[..., nn.Module], expansion: int, blocks_per_stage: int) -> list[nn.Sequential]:
    stages = []
    in_channels = 16
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        blocks = []
        for index in range(blocks_per_stage):
            blocks.append(block(in_channels, channels, stride if index == 0 else 1))
            in_channels = channels * expansion
        stages.append(nn.Sequential(*blocks))
    return stages


class PreactResNet(nn.Module):
    """Pre-activation ResNet (He et al. 2016b), the network of Veit et al. 2016 at depth 110.

    Args:
        depth: Number of weight layers; 6n + 2 with basic blocks (3n blocks), 9n + 2 with bottleneck blocks.
        in_channels: Channels of the image.
        num_classes: Number of logits.
        bottleneck: Whether blocks have three convolutions instead of two.
    """

    basic_block: type[PreactBasicBlock] = PreactBasicBlock

    def __init__(self, depth: int, in_channels: int = 1, num_classes: int = 10, *, bottleneck: bool = False) -> None:
        super().__init__()
        block = PreactBottleneckBlock if bottleneck else self.basic_block
        per_stage = (depth - 2) // (9 if bottleneck else 6)
        self.conv = _conv(in_channels, 16, 3)
        self.layer1, self.layer2, self.layer3 = _stages(block, block.expansion, per_stage)
        self.bn = nn.BatchNorm2d(64 * block.expansion)
        self.fc = nn.Linear(64 * block.expansion, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, H, W]."""
        x = self.layer3(self.layer2(self.layer1(self.conv(x))))
        logits: torch.Tensor = self.fc(F.relu(self.bn(x)).mean((2, 3)))
        return logits


class OptionAPreactResNet(PreactResNet):
    """Pre-activation ResNet whose skips have no parameters, as in Veit et al. 2016."""

    basic_block = PreactOptionABlock


class ResNet(nn.Module):
    """Post-activation ResNet with shortcuts of option A (He et al. 2016a, section 4.2).

    Args:
        depth: Number of weight layers, 6n + 2, in 3n blocks.
        in_channels: Channels of the image.
        num_classes: Number of logits.
    """

    block: type[nn.Module] = BasicBlock

    def __init__(self, depth: int, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = _conv(in_channels, 16, 3)
        self.bn = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stages(self.block, 1, (depth - 2) // 6)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, H, W]."""
        x = F.relu(self.bn(self.conv(x)))
        logits: torch.Tensor = self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


class PlainNet(ResNet):
    """Plain net: the post-activation ResNet without its skips, with equal parameters (He et al. 2016a).

    Its 3n blocks have no skips, so that there is one path.
    """

    block = PlainBlock

"""DenseNet: every layer reads the features of all previous layers of its stage (Huang et al. 2017)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["DenseNet"]


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, whose `growth` channels are appended to the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, H, W] to [batch, in_channels + growth, H, W]."""
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, a 1x1 convolution that keeps the number of channels, and 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, H, W] to [batch, channels, H / 2, W / 2]."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """DenseNet of 40 layers without bottlenecks and compression (Huang et al. 2017, table 2).

    Three stages of twelve layers with two transitions between them, starting from 16 channels. Each of the 36 layers is
    a block: the skip keeps its input, and the branch computes the new channels.

    Args:
        in_channels: Channels of the image.
        num_classes: Number of logits.
        growth: Channels added by each layer.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, *, growth: int) -> None:
        super().__init__()
        channels = [16 + 12 * growth * stage for stage in range(4)]
        self.conv = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(DenseLayer(width + growth * index, growth) for index in range(12)))
            for width in channels[:3]
        )
        self.transition1 = Transition(channels[1])
        self.transition2 = Transition(channels[2])
        self.bn = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, H, W]."""
        x = self.transition1(self.layer1(self.conv(x)))
        x = self.layer3(self.transition2(self.layer2(x)))
        logits: torch.Tensor = self.fc(F.relu(self.bn(x)).mean((2, 3)))
        return logits

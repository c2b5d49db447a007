"""Small U-Net: long skips from the contracting to the expanding path, by concatenation (Ronneberger et al. 2015)."""

from __future__ import annotations

import torch
from torch import nn

from resnet_paths.zoo.resnet import PlainBlock

__all__ = ["UNet"]


class Level(nn.Module):
    """One level: a long skip, concatenated with a branch that contains all lower levels.

    The branch has two 3x3 convolutions, the first with stride 2, the lower levels, and a transposed convolution; two
    more convolutions follow the concatenation.
    """

    def __init__(self, channels: int, below: nn.Module) -> None:
        super().__init__()
        self.down = PlainBlock(channels, 2 * channels, 2)
        self.below = below
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.join = PlainBlock(2 * channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, H, W] to the same shape."""
        joined: torch.Tensor = self.join(torch.cat([x, self.up(self.below(self.down(x)))], 1))
        return joined


class UNet(nn.Module):
    """U-Net of three levels with 12, 24 and 48 channels, from images to images.

    Its 3x3 convolutions have BatchNorm and ReLU. It unravels into one block with another block in its branch: three
    paths, through the long skip of the first level, of the second level, or through the bottom.

    Args:
        in_channels: Channels of the image, in and out; height and width are multiples of 4.
        num_classes: Not used, since the output is an image.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.first = PlainBlock(in_channels, 12, 1)
        self.level = Level(12, below=Level(24, below=nn.Identity()))
        self.last = nn.Conv2d(12, in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, in_channels, H, W] to images of the same shape."""
        image: torch.Tensor = self.last(self.level(self.first(x)))
        return image

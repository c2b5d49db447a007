"""Highway network: elementwise gates between the layer and the skip (Srivastava et al. 2015)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["GatedBranch", "GatedSkip", "HighwayLayer", "HighwayNet"]


class HighwayLayer(nn.Module):
    """y = T * H + (1 - T) * x, written as x + T * (H - x): an identity skip and a gated branch.

    H is a 3x3 convolution with ReLU, T a 3x3 convolution with a sigmoid. Where the gate T is closed, y equals x.

    `resnet_paths.unravel` takes x as the skip and T * (H - x) as the branch, in either spelling: a deleted block passes
    its input on. `GatedSkip` and `GatedBranch` are the other reading, as the equation is written, with (1 - T) * x as
    the skip and T * H as the branch: the same function and gradient, with other path lengths.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.transform = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, H, W] to the same shape."""
        return x + torch.sigmoid(self.gate(x)) * (F.relu(self.transform(x)) - x)

    def initialise(self, generator: torch.Generator) -> None:
        """Initialise the gates mostly closed, so that an untrained network passes its input on.

        Deeper networks need lower initial biases (section 2.1 of the paper): with -2, the 48 layers of the network
        below replace nearly all of their input, and training does not start.
        """
        nn.init.constant_(self.gate.bias, -4.0)  # type: ignore[arg-type]


class GatedSkip(nn.Module):
    """(1 - T) * x of a highway layer, whose weights it shares.

    Args:
        layer: The layer.

    Example:
        >>> layer, x = HighwayLayer(2), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(GatedSkip(layer)(x) + GatedBranch(layer)(x), layer(x), atol=1e-6)
        True
    """

    def __init__(self, layer: HighwayLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, H, W] to the same shape."""
        return (1 - torch.sigmoid(self.layer.gate(x))) * x


class GatedBranch(nn.Module):
    """T * H of a highway layer, whose weights it shares.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: HighwayLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, H, W] to the same shape."""
        return torch.sigmoid(self.layer.gate(x)) * F.relu(self.layer.transform(x))


class HighwayNet(nn.Module):
    """Highway network of 50 layers, narrow and convolutional, without BatchNorm (Srivastava et al. 2015).

    A convolution, 48 gated layers of 16 channels, each a block, and a linear layer. 24 gated layers have half and 24
    quarter resolution, with 2x2 max pooling before each 24; the linear layer reads means over 4 x 4 regions.

    Args:
        in_channels: Channels of the image.
        num_classes: Number of logits.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.layer1 = nn.Sequential(*(HighwayLayer(16) for _ in range(24)))
        self.layer2 = nn.Sequential(*(HighwayLayer(16) for _ in range(24)))
        self.fc = nn.Linear(16 * 4 * 4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, num_classes] of images [batch, in_channels, H, W]."""
        x = self.layer1(F.max_pool2d(F.relu(self.conv(x)), 2))
        x = self.layer2(F.max_pool2d(x, 2))
        logits: torch.Tensor = self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))
        return logits

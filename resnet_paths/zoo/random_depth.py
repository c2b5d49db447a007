"""Pre-activation ResNets that train a random subset of their blocks in each mini-batch.

The branch of a block that is not drawn is omitted from the forward and the backward pass of the mini-batch; its
BatchNorm statistics and parameters do not change. Projections are not part of the branch and are always computed. The
weights are named as in `resnet_paths.zoo.resnet.PreactResNet`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional as F

from resnet_paths.zoo.resnet import PreactBasicBlock, PreactResNet

__all__ = ["EffectiveResNet", "StochasticDepthResNet"]


class DrawnBlock(PreactBasicBlock):
    """Pre-activation block: skip + branch, or the skip alone, in training; skip + survival * branch in eval mode."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.survival = 1.0
        self.is_drawn = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_channels, H, W] to [batch, channels, H / stride, W / stride]."""
        if self.training and self.is_drawn:
            return super().forward(x)
        if self.training and self.projection is None:
            return x
        activated = F.relu(self.bn1(x))
        skip = self.skip(x, activated)
        return skip if self.training else skip + self.survival * self.branch(activated)


class DrawnResNet(PreactResNet):
    """Base class of networks with randomly drawn blocks."""

    basic_block = DrawnBlock

    def blocks(self) -> list[DrawnBlock]:
        """All blocks, in order."""
        return [*self.layer1, *self.layer2, *self.layer3]

    def mark(self, is_drawn: Iterable[bool]) -> None:
        """Set which blocks the next mini-batch trains, one entry per block."""
        for block, mark in zip(self.blocks(), is_drawn, strict=True):
            block.is_drawn = bool(mark)


class StochasticDepthResNet(DrawnResNet):
    """ResNet with stochastic depth: each block survives a mini-batch with a given probability (Huang et al. 2016).

    Block l of L, counted from 1, survives with probability p_l = 1 - l / L * (1 - p_L), with p_L = 0.5, the linear
    decay of the paper; in eval mode its branch is multiplied by p_l.

    Args:
        depth: Number of weight layers, 6n + 2, in 3n blocks.
        in_channels: Channels of the image.
        num_classes: Number of logits.
    """

    def __init__(self, depth: int, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__(depth, in_channels, num_classes)
        blocks = self.blocks()
        for index, block in enumerate(blocks):
            block.survival = 1 - (index + 1) / len(blocks) * 0.5

    def draw_blocks(self, generator: torch.Generator) -> None:
        """Draw the blocks that survive the next mini-batch."""
        draws = torch.rand(len(self.blocks()), generator=generator).tolist()
        self.mark(draw < block.survival for draw, block in zip(draws, self.blocks(), strict=True))


class EffectiveResNet(DrawnResNet):
    """ResNet trained with effective paths only: each mini-batch trains m of n blocks (Veit et al. 2016, section 4.3).

    The paper draws exactly 23 of 54 blocks, so that the mean path length is 11.5. With a range of numbers, m is drawn
    uniformly for each mini-batch. In eval mode all branches are multiplied by the probability that a block is drawn,
    m / n, as in stochastic depth; the paper does not describe its evaluation.

    Args:
        depth: Number of weight layers, 6n + 2, in 3n blocks.
        in_channels: Channels of the image.
        num_classes: Number of logits.
        num_drawn_blocks: Minimum and maximum number of blocks trained per mini-batch.
    """

    def __init__(
        self, depth: int, in_channels: int = 1, num_classes: int = 10, *, num_drawn_blocks: tuple[int, int]
    ) -> None:
        super().__init__(depth, in_channels, num_classes)
        self.num_drawn_blocks = num_drawn_blocks
        for block in self.blocks():
            block.survival = sum(num_drawn_blocks) / 2 / len(self.blocks())

    def draw_blocks(self, generator: torch.Generator) -> None:
        """Draw the blocks that the next mini-batch trains."""
        low, high = self.num_drawn_blocks
        number = int(torch.randint(low, high + 1, (), generator=generator))
        order = torch.randperm(len(self.blocks()), generator=generator).tolist()
        self.mark(rank < number for rank in order)

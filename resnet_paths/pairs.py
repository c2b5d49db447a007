"""The parts of blocks whose state is a pair: a value and a sum to which every block adds, as in WaveNet.

    (x, s) -> (x + branch(x), s + side(x))

A residual chain on the pair (van den Oord et al. 2016, figure 4: the residual and the skip connections). Paths that
take no branch reach the sum with nothing; each other path leaves x at the last branch that it takes.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["OfValue", "TakeSum", "WithEmptySum"]

Pair = tuple[torch.Tensor, torch.Tensor]


class WithEmptySum(nn.Module):
    """x becomes the pair of x and zeros.

    Args:
        shape: Shape of the sum, without the batch.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.training = False

    def forward(self, x: torch.Tensor) -> Pair:
        """[batch, ...] to the pair."""
        return x, x.new_zeros(len(x), *self.shape)

    def extra_repr(self) -> str:
        """The shape of the sum."""
        return str(self.shape)


class OfValue(nn.Module):
    """What a block adds to the pair, computed from the value alone.

    Args:
        module: From x to (branch(x), side(x)), or to side(x).
        adds_to_value: Whether it gives both.
    """

    def __init__(self, module: nn.Module, *, adds_to_value: bool) -> None:
        super().__init__()
        self.module = module
        self.adds_to_value = adds_to_value
        self.training = False

    def forward(self, pair: Pair) -> Pair:
        """What is added to x and to the sum."""
        made = self.module(pair[0])
        return (made[0], made[1]) if self.adds_to_value else (torch.zeros_like(pair[0]), made)


class TakeSum(nn.Module):
    """The sum of the pair."""

    def forward(self, pair: Pair) -> torch.Tensor:
        """The sum."""
        return pair[1]

"""The parts of blocks that all read something beside their value, such as an attention mask.

    (x, c) -> (x + branch(x, c), c)

What is read is carried along in the state, unchanged: the chain stays a composition of its blocks, and every edit keeps
the mask. A branch adds zeros to it, so that it is there once; a path without the skip passes it on (`PassingOn`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Carried", "Carrying", "OfState", "OnFirst", "PassingOn", "TakeFirst", "carries"]

State = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Carried:
    """How a tensor is carried: as floating numbers with the batch in dimension 0, as every part of a state is.

    Attributes:
        dtype: The dtype in which blocks read it.
        is_row: Whether it is one row for all examples.
        is_constant: Whether it has no gradient, as what is made from integers or truth values.
    """

    dtype: torch.dtype
    is_row: bool
    is_constant: bool

    def packed(self, tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The tensor as a part of the state, beside `x`."""
        if not tensor.is_floating_point():
            # Every integer up to 2**53 is a number of float64.
            tensor = tensor.to(x.dtype if tensor.dtype == torch.bool else torch.float64)
        return tensor.expand(len(x), *tensor.shape[1:]) if self.is_row else tensor

    def unpacked(self, part: torch.Tensor) -> torch.Tensor:
        """The tensor as blocks read it."""
        part = part.detach() if self.is_constant else part
        return (part[:1] if self.is_row else part).to(self.dtype)


class Carrying(nn.Module):
    """A stem that makes the state: from the inputs to x and what is carried beside it.

    Args:
        module: From the inputs to (x, c, ...).
        kinds: How each c is carried.
    """

    def __init__(self, module: nn.Module, kinds: Sequence[Carried]) -> None:
        super().__init__()
        self.module = module
        self.kinds = tuple(kinds)
        self.training = False

    def forward(self, *inputs: Any) -> State:
        """The state."""
        x, *others = self.module(*inputs)
        return (x, *(kind.packed(c, x) for kind, c in zip(self.kinds, others, strict=True)))


class OfState(nn.Module):
    """A part of a block that reads x and what is carried.

    Args:
        module: From (x, c, ...) to a tensor.
        kinds: How each c is carried.
        adds: Whether its result is added to another state: what is carried then comes from there, and zeros from here.
    """

    def __init__(self, module: nn.Module, kinds: Sequence[Carried], *, adds: bool) -> None:
        super().__init__()
        self.module = module
        self.kinds = tuple(kinds)
        self.adds = adds
        self.training = False

    def forward(self, state: State) -> State:
        """(module(x, c), c), or with zeros for c."""
        x, *others = state
        made = self.module(x, *(kind.unpacked(c) for kind, c in zip(self.kinds, others, strict=True)))
        return (made, *(map(torch.zeros_like, others) if self.adds else others))


class OnFirst(nn.Module):
    """A module that changes x alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = False

    def forward(self, state: State) -> State:
        """(module(x), c, ...)."""
        return self.module(state[0]), *state[1:]


class PassingOn(nn.Module):
    """A branch without the skip beside it: what is carried stays as it was."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.training = branch.training

    def forward(self, state: State) -> State:
        """(branch(x), c, ...)."""
        return self.branch(state)[0], *state[1:]


class TakeFirst(nn.Module):
    """x of the state."""

    def forward(self, state: State) -> torch.Tensor:
        """The first tensor."""
        return state[0]


def carries(module: nn.Module) -> bool:
    """Whether a part of a block works on a state that carries something.

    Args:
        module: The part.

    Returns:
        Whether it does.
    """
    return any(isinstance(part, OfState) for part in module.modules())

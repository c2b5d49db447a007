"""The parts of blocks whose state is a tuple of tensors: x, which branches work on, and what goes along beside it.

- What every block reads but none changes, such as an attention mask: (x, c) -> (x + branch(x, c), c). It is carried
  along, so that the chain stays a composition of its blocks and every edit keeps the mask. A branch adds zeros to it,
  so that it is there once; a path without the skip passes it on (`PassingOn`).
- A sum to which every block adds, as in WaveNet (van den Oord et al. 2016, figure 4: the residual and the skip
  connections): (x, s) -> (x + branch(x), s + side(x)). Paths that take no branch reach the sum with nothing; each
  other path leaves x at the last branch that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resnet_paths._utils.devices import widest_float
from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["Carried", "Carrying", "OnParts", "PassingOn", "Take", "WithEmptySum", "carries", "with_x", "x_of"]

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
            # Every integer up to 2**53 is a number of float64, up to 2**24 of float32.
            tensor = tensor.to(x.dtype if tensor.dtype == torch.bool else widest_float(x.device))
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


class WithEmptySum(nn.Module):
    """x becomes the pair of x and zeros.

    Args:
        shape: Shape of the sum, without the batch.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.training = False

    def forward(self, x: torch.Tensor) -> State:
        """[batch, ...] to the pair."""
        return x, x.new_zeros(len(x), *self.shape)

    def extra_repr(self) -> str:
        """The shape of the sum."""
        return str(self.shape)


class OnParts(nn.Module):
    """A module that reads x, and what is carried, and makes some parts of the state anew.

    Args:
        module: From (x, c, ...) to a tensor for each part that it makes.
        makes: Positions of these parts.
        kinds: How each c that it reads is carried; none where it reads x alone.
        adds: Whether its result is added to another state: the parts that it does not make are zeros then, else those
            that it was given.
    """

    def __init__(
        self, module: nn.Module, makes: Sequence[int] = (0,), kinds: Sequence[Carried] = (), *, adds: bool = False
    ) -> None:
        super().__init__()
        self.module = module
        self.makes = tuple(makes)
        self.kinds = tuple(kinds)
        self.adds = adds
        self.training = False

    def forward(self, state: State) -> State:
        """The state, of as many parts."""
        x, *others = state
        made = self.module(x, *(kind.unpacked(c) for kind, c in zip(self.kinds, others, strict=False)))
        parts = dict(zip(self.makes, made if isinstance(made, tuple) else (made,), strict=True))

        def left(part: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(part) if self.adds else part

        return tuple(parts[i] if i in parts else left(part) for i, part in enumerate(state))


class PassingOn(nn.Module):
    """A branch without the skip beside it: what is carried, where anything is, stays as it was.

    Args:
        branch: The branch.
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.training = branch.training

    def forward(self, state: Any) -> Any:
        """(branch(x), c, ...)."""
        made = self.branch(state)
        # What the branch carries may begin and end inside it.
        return (made[0], *state[1:]) if isinstance(state, tuple) else made


class Take(nn.Module):
    """One part of the state.

    Args:
        part: Its position.
    """

    def __init__(self, part: int) -> None:
        super().__init__()
        self.part = part

    def forward(self, state: State) -> torch.Tensor:
        """The part."""
        return state[self.part]


def carries(module: nn.Module) -> bool:
    """Whether a chain, or a part of it, has states that carry something.

    Args:
        module: The chain or the part.

    Returns:
        Whether it does.
    """
    return any(isinstance(m, Carrying) or (isinstance(m, OnParts) and m.kinds) for m in module.modules())


def x_of(state: Any, chain: nn.Module) -> torch.Tensor:
    """What the branches of a chain work on, without what its states carry.

    Args:
        state: A state of the chain.
        chain: The chain.

    Returns:
        One tensor.

    Raises:
        ResnetPathsError: If it is several, such as WaveNet's pair.
    """
    if isinstance(state, tuple) and not carries(chain):
        raise ResnetPathsError("chain", f"a state of {len(state)} tensors", "blocks that work on one tensor")
    x: torch.Tensor = state[0] if isinstance(state, tuple) else state
    return x


def with_x(state: Any, x: torch.Tensor) -> Any:
    """A state with another x.

    Args:
        state: A tensor, or a tuple.
        x: The tensor that takes the place of the first.

    Returns:
        The state.
    """
    return (x, *state[1:]) if isinstance(state, tuple) else x

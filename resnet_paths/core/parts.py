"""The modules that blocks are made of beside pieces of exported graphs, and how a part is given its context."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, TypedDict

import torch
from torch import nn
from torch.fx import GraphModule

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.in_place import keeps_its_input

__all__ = [
    "BlockFields",
    "Constant",
    "LinearCombination",
    "Parallel",
    "Placed",
    "added",
    "call_part",
    "context_read_by",
]

State: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]
"""What a part written by hand may return; only one tensor can be added."""


class BlockFields(TypedDict, total=False):
    """The arguments of `resnet_paths.core.chain.Block`, by name."""

    branch: nn.Module | None
    skip: nn.Module | None
    pre: nn.Module | None
    pre_stays: bool
    post: nn.Module | None
    name: str
    skip_kind: str | None
    stage: int
    in_shape: Sequence[int] | None
    out_shape: Sequence[int] | None


def context_read_by(*parts: nn.Module | None) -> tuple[str, ...]:
    """Names of the context that parts of a chain read.

    Args:
        *parts: Parts of a block, blocks, chains inside branches, or heads. A module that is no piece of an exported
            graph names them in its attribute ``reads_context``; without one it reads none.

    Returns:
        The names, each once.
    """
    names: list[str] = []
    for part in parts:
        if isinstance(part, GraphModule):
            placeholders = itertools.takewhile(lambda node: node.op == "placeholder", part.graph.nodes)
            names += [str(node.target) for node in placeholders][1:]
        else:
            names += getattr(part, "reads_context", ())
    return tuple(dict.fromkeys(names))


def call_part(part: nn.Module, x: torch.Tensor, context: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a part of a chain returns for a state, given what it reads of the context.

    Args:
        part: A part of a block, a block, a chain inside a branch, or a head.
        x: The state, which stays as it is: a part that may work in place is given a copy, since others read it too.
        context: The context of the whole chain by name.

    Returns:
        Its output.
    """
    if not keeps_its_input(part):
        x = x.clone()
    if not context:
        return part(x)  # type: ignore[no-any-return]
    return part(x, **{name: context[name] for name in context_read_by(part)})  # type: ignore[no-any-return]


def added(one: State, other: State) -> torch.Tensor:
    """The sum of two states.

    Args:
        one: What a skip or a branch returns.
        other: Likewise.

    Returns:
        Their sum.

    Raises:
        ResnetPathsError: If one of them is several tensors; tuples would be joined and not added.
    """
    if isinstance(one, tuple | list) or isinstance(other, tuple | list):
        raise ResnetPathsError(
            "state",
            f"{len(one if isinstance(one, tuple | list) else other)} tensors",
            "one tensor",
            "Concatenate them, or let the stem return what no block changes as context.",
        )
    return one + other


class LinearCombination(nn.ModuleList):
    """Modules at one input, each times a number, added up: ``sum(factor * module(x))``.

    A scaled branch is one of a single module; what a group of blocks adds to its input is the difference
    ``run(x) - around(x)``. A path takes it as a whole, unlike `Parallel`.

    Args:
        modules: The modules.
        factors: A number for each.
    """

    def __init__(self, modules: Iterable[nn.Module], factors: Iterable[float]) -> None:
        super().__init__(modules)
        self.factors = tuple(factors)
        self.training = any(module.training for module in self)
        self.reads_context = context_read_by(*self)

    @property
    def is_difference(self) -> bool:
        """Whether it is one module less another, as of a group of blocks."""
        return self.factors == (1.0, -1.0)

    def forward(self, x: torch.Tensor, **context: torch.Tensor) -> torch.Tensor:
        """The sum at `x`."""
        terms = (f * call_part(part, x, context) for part, f in zip(self, self.factors, strict=True))
        return functools.reduce(added, terms)

    def extra_repr(self) -> str:
        """The factors."""
        return f"factors={self.factors}"


class Constant(nn.Module):
    """A branch that returns the same for every example.

    Args:
        value: What it returns, without the batch dimension.
    """

    value: torch.Tensor

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, *value.shape] for an `x` of this batch."""
        return self.value.expand(len(x), *self.value.shape)


class Placed(nn.Module):
    """A tensor placed into a wider space, zeros around it: concatenation is addition of two that are placed so.

    Args:
        dim: The dimension that grows, batch counted; at least 1.
        before: Number of zeros before it.
        after: Number of zeros after it.
    """

    def __init__(self, dim: int, before: int, after: int) -> None:
        super().__init__()
        self.dim = dim
        self.before = before
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size, ...] to [..., before + size + after, ...]."""
        zeros = [x.new_zeros(*x.shape[: self.dim], n, *x.shape[self.dim + 1 :]) for n in (self.before, self.after)]
        return torch.cat([zeros[0], x, zeros[1]], self.dim)

    def extra_repr(self) -> str:
        """The dimension and the zeros."""
        return f"dim={self.dim}, before={self.before}, after={self.after}"


class Parallel(nn.ModuleList):
    """Branches side by side, added up: ``sum(branch(x) for branch in branches)``; a path takes one of them.

    Args:
        branches: The branches.
        onto_skip: Whether a block adds them to its skip one after the other, as some models do, not their sum at once.
            The two differ by rounding alone.
        names: A name for each branch, such as that of its module in the model; empty if they have none.
    """

    def __init__(self, branches: Iterable[nn.Module], *, onto_skip: bool = False, names: Iterable[str] = ()) -> None:
        super().__init__(branches)
        self.names = tuple(names)
        self.training = any(branch.training for branch in self)
        self.onto_skip = onto_skip
        self.reads_context = context_read_by(*self)

    def forward(self, x: torch.Tensor, **context: torch.Tensor) -> torch.Tensor:
        """The sum of all branches at `x`."""
        first, *others = self
        total = call_part(first, x, context)
        for branch in others:
            total = added(total, call_part(branch, x, context))
        return total

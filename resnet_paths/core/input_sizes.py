"""Which sizes of a chain's inputs are free, and the check that inputs have sizes that the chain was read for.

A chain is cut out of a graph that `torch.export` recorded on one example. Sizes that the export left free are symbols
in it; all others are numbers in it. What the model's code asked of the free ones, such as ``height % 8 == 0``, is
a condition: other sizes would have taken another way through the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.inputs import LABELS_ARE_APART
from resnet_paths.core.signature import Signature

__all__ = ["CheckedInputs", "InputSizes"]

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class InputSizes:
    """The sizes that the inputs of a chain may have.

    Attributes:
        shapes: For each input its sizes: numbers where they are fixed, symbols such as ``height`` where they are free;
            one symbol in several places stands for one size. Dimension 0 is the batch: it is shown, and not checked.
        conditions: What free sizes have to fulfil beside being 2 at least.
    """

    shapes: tuple[tuple[sympy.Expr, ...], ...]
    conditions: tuple[sympy.Basic, ...] = ()
    _met: set[tuple[Sizes, ...]] = field(default_factory=set, repr=False, compare=False)

    @property
    def batch(self) -> sympy.Symbol | None:
        """The symbol of the batch; None if no input has a free dimension 0."""
        return next((shape[0] for shape in self.shapes if shape and shape[0].is_Symbol), None)

    @property
    def free(self) -> tuple[sympy.Symbol, ...]:
        """The free sizes beside the batch, in order."""
        found = dict.fromkeys(size for shape in self.shapes for size in shape[1:] if size.is_Symbol)
        return tuple(size for size in found if size != self.batch)

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Check the sizes of inputs.

        Args:
            tensors: The inputs.

        Raises:
            ResnetPathsError: If they differ from the example where sizes are fixed, differ among one another where one
                symbol stands for all, or do not meet the conditions.
        """
        shapes = tuple(tuple(map(int, tensor.shape)) for tensor in tensors)
        if shapes in self._met:
            return
        values = self._values(shapes)
        if values is None:
            raise ResnetPathsError(
                "inputs",
                [["batch", *shape[1:]] for shape in shapes],
                f"{[['batch', *map(_plain, shape[1:])] for shape in self.shapes]}: numbers are fixed, names are free",
                LABELS_ARE_APART
                if len(shapes) > len(self.shapes)
                else "Unravel the model again with an example of this shape.",
            )
        unmet = self._unmet(values)
        if unmet is not None:
            raise ResnetPathsError(
                "inputs",
                ", ".join(f"{name} {value}" for name, value in values.items()),
                f"sizes with {_shown(unmet)}, as for the example that was unraveled",
                "The model's code distinguishes these sizes: unravel it again with an example of this shape.",
            )
        self._met.add(shapes)

    def allows(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether inputs have such sizes."""
        values = self._values([tuple(tensor.shape) for tensor in tensors])
        return values is not None and self._unmet(values) is None

    def _values(self, shapes: Sequence[Sizes]) -> dict[sympy.Symbol, int] | None:
        """The value of every symbol; None if shapes do not fit."""
        if [len(shape) for shape in shapes] != [len(shape) for shape in self.shapes]:
            return None
        batch = max((shape[0] for shape in shapes if shape), default=1)
        values = {} if self.batch is None else {self.batch: batch}
        for found, wanted in zip(shapes, self.shapes, strict=True):
            for size, expected in zip(found[1:], wanted[1:], strict=True):
                if size != (values.setdefault(expected, size) if expected.is_Symbol else int(expected)):
                    return None
        return values

    def _unmet(self, values: dict[sympy.Symbol, int]) -> sympy.Basic | None:
        """The first condition that some sizes do not meet; None if they meet all."""
        small = next((name for name in self.free if values[name] < 2), None)
        if small is not None:
            return small >= 2
        # The export records a batch of at least two; that one example alone is treated alike is checked elsewhere.
        sizes = {name: max(value, 2) for name, value in values.items()}
        return next((each for each in self.conditions if each.subs(sizes) == sympy.false), None)

    def others(self, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Inputs of other sizes, made from an example: cut off, or repeated, along the free dimensions.

        Args:
            tensors: The example.

        Yields:
            Inputs whose free sizes all differ from the example's, from cheap to costly. Not every model takes them.
        """
        example = self._values([tuple(tensor.shape) for tensor in tensors])
        if not self.free or example is None:
            return
        for change in _CHANGES:
            values = {name: change(example[name], k) for k, name in enumerate(self.free)}
            made = tuple(_resized(tensor, shape, values) for tensor, shape in zip(tensors, self.shapes, strict=True))
            if all(values[name] != example[name] for name in self.free) and self.allows(made):
                yield made

    def __str__(self) -> str:
        """Such as ``"[batch, 3, height, width]; batch, height and width are free"``."""
        shapes = ", ".join(f"[{', '.join(map(str, shape))}]" for shape in self.shapes)
        names = [str(name) for name in (self.batch, *self.free) if name is not None]
        if not names:
            return f"{shapes}; all are fixed"
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return f"{shapes}; {listed if self.free else f'only {listed}'} {'are' if len(names) > 1 else 'is'} free"


# Odd numbers, different for every dimension; then numbers that have the divisors of the example's sizes.
_CHANGES: tuple[Callable[[int, int], int], ...] = (
    lambda size, k: max(2, size * 3 // 4 - k | 1),
    lambda size, _: size // 2,
    lambda size, k: size + 1 + k,
    lambda size, _: 2 * size,
)


def _resized(tensor: torch.Tensor, shape: Sequence[sympy.Expr], values: dict[sympy.Symbol, int]) -> torch.Tensor:
    for dim, name in enumerate(shape):
        if name in values:
            positions = torch.arange(values[name], device=tensor.device) % tensor.shape[dim]
            tensor = tensor.index_select(dim, positions)
    return tensor.clone()


def _plain(size: sympy.Expr) -> int | str:
    return str(size) if size.is_Symbol else int(size)


def _shown(condition: sympy.Basic) -> str:
    relation = getattr(condition, "rel_op", None)
    return str(condition) if relation is None else f"{condition.lhs} {relation} {condition.rhs}"


class CheckedInputs(nn.Module):
    """A module that first checks the sizes of its inputs: its graph may hold sizes as numbers.

    Args:
        module: The module; it takes tensors in a row.
        sizes: What sizes they may have.
        signature: How the model is called; None where its arguments are tensors in a row.
    """

    def __init__(self, module: nn.Module, sizes: InputSizes, signature: Signature | None = None) -> None:
        super().__init__()
        self.module = module
        self.sizes = sizes
        self.signature = signature
        self.training = False

    def check(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inputs, once they are known to have the right sizes."""
        if not torch.compiler.is_exporting():  # where sizes are symbols, which a look at their values would fix
            self.sizes.check(inputs)
        return inputs

    def forward(self, *inputs: Any, **keywords: object) -> object:
        """What the module returns, for inputs of the right sizes."""
        tensors = inputs if self.signature is None else self.signature.tensors(inputs, keywords)
        return self.module(*self.check(*tensors))

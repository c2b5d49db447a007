"""Stacks of cotangents, one for each path length: what the backward pass carries from block to block.

Stacks are kept as mantissas and exponents: in float32 the gradient of a path through 54 branches easily falls below
1e-38, where a number becomes 0 without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from resnet_paths.gradients.adjoints import Pullback, each_part, unchanged

__all__ = ["Stack", "combined", "joined", "parts_of", "rows_of"]

_CHUNK_BYTES = 2**23  # small enough for the caches; larger is no faster
_ZERO = -(2**20)  # the exponent of a row of zeros: below every other


def parts_of(state: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that a state is made of.

    Args:
        state: A tensor or a tuple of tensors.

    Returns:
        A tuple of tensors.
    """
    return state if isinstance(state, tuple) else (state,)


@dataclass(frozen=True)
class Stack:
    """Cotangents of one state, apart by path length.

    Where lengths are not counted, the first dimension may stand for something else, such as single paths.

    Attributes:
        values: Mantissas [length, draw, batch, ...]; a tuple of such where the state is a tuple.
        exponents: Row (k, d, b) stands for ``values[k, d, b] * 2**exponents[k, d, b]``; int32 [length, draw, batch].
        shortest: Path length of the first row.
    """

    values: Any
    exponents: torch.Tensor
    shortest: int = 0

    @classmethod
    def of(cls, cotangent: Any, num_rows: int = 1, num_draws: int = 1) -> Stack:
        """A stack of the empty path alone, so many times."""
        first = parts_of(cotangent)[0]
        exponents = torch.zeros(num_rows, num_draws, len(first), dtype=torch.int32, device=first.device)
        values = each_part(lambda t: _repeated(t, num_rows, num_draws), cotangent)
        return cls(values, exponents).renormalised()

    def __len__(self) -> int:
        """Number of path lengths."""
        return len(self.exponents)

    @property
    def longest(self) -> int:
        """Path length of the last row."""
        return self.shortest + len(self) - 1

    def rows(self, start: int, stop: int) -> Stack:
        """Some of its lengths, by position."""
        return Stack(each_part(lambda t: t[start:stop], self.values), self.exponents[start:stop], self.shortest + start)

    def chunks(self) -> Iterator[Stack]:
        """Runs of lengths small enough for what a branch computes inside."""
        row_bytes = sum(t[0].numel() * t.element_size() for t in parts_of(self.values))
        size = max(_CHUNK_BYTES // max(row_bytes, 1), 1)
        return (self.rows(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def pulled(self, pullback: Pullback) -> Stack:
        """The stack at the input of a part, given its transposed Jacobian."""
        if pullback is unchanged or not len(self):
            return self
        pieces = [_pull(pullback, chunk.values) for chunk in self.chunks()]
        values = pieces[0] if len(pieces) == 1 else each_part(lambda *parts: torch.cat(parts), *pieces)
        return replace(self, values=values)

    def renormalised(self) -> Stack:
        """The same cotangents with mantissas far from the ends of the dtype's range."""
        largest = torch.stack([_largest(part) for part in parts_of(self.values)]).amax(0)
        shift = torch.frexp(largest).exponent.to(torch.int32)
        room = 2 if largest.dtype == torch.float16 else 30
        shift = torch.where(shift.abs() > room, shift, 0)
        exponents = torch.where(largest == 0, _ZERO, self.exponents + shift)
        if not bool(shift.any()):
            return replace(self, exponents=exponents)
        # In two steps: 2**140 is no float32, though the product may be.
        half = shift // 2
        values = each_part(lambda t: t * _power_of_two(-half, t) * _power_of_two(half - shift, t), self.values)
        return Stack(values, exponents, self.shortest)


def _repeated(cotangent: torch.Tensor, num_rows: int, num_draws: int) -> torch.Tensor:
    rows = _room_for(cotangent[None, None], num_rows, num_draws)
    return rows.copy_(cotangent.expand(num_rows, num_draws, *cotangent.shape))


def _pull(pullback: Pullback, values: Any) -> Any:
    """`pullback` with lengths and draws as one stack."""
    shape = parts_of(values)[0].shape[:2]
    return each_part(lambda t: t.unflatten(0, shape), pullback(each_part(lambda t: t.flatten(0, 1), values)))


def combined(
    through_skip: Stack | None, source: Stack, pullback: Pullback, signs: torch.Tensor | None = None, longer: int = 1
) -> Stack:
    """``through_skip[k] + signs * pullback(source[k - longer])`` for every length k: what leaves a residual block.

    Args:
        through_skip: Cotangents that took the skip; None where there is none.
        source: Cotangents above the branch.
        pullback: Transposed Jacobian of the branch.
        signs: Numbers [draw, batch], or None for 1.
        longer: What the branch adds to the length of a path.

    Returns:
        The stack at the block's input.
    """
    shortest, longest = source.shortest + longer, source.longest + longer
    if through_skip is not None:
        shortest, longest = min(shortest, through_skip.shortest), max(longest, through_skip.longest)
    exponents = source.exponents.new_full((longest - shortest + 1, *source.exponents.shape[1:]), _ZERO)
    for stack, shift in [(source, longer)] if through_skip is None else [(through_skip, 0), (source, longer)]:
        place = slice(stack.shortest + shift - shortest, stack.longest + shift - shortest + 1)
        exponents[place] = torch.maximum(exponents[place], stack.exponents)
    total: tuple[torch.Tensor, ...] = ()
    is_pair = through_skip is not None and isinstance(through_skip.values, tuple)
    if through_skip is not None:
        start, stop = through_skip.shortest - shortest, through_skip.longest - shortest + 1
        scale = through_skip.exponents - exponents[start:stop]
        total = tuple(_room_for(part, len(exponents)) for part in parts_of(through_skip.values))
        for whole, part in zip(total, parts_of(through_skip.values), strict=True):
            whole[:start] = 0
            torch.mul(part, _power_of_two(scale, part), out=whole[start:stop])
            whole[stop:] = 0
    for chunk in source.chunks():
        pulled = _pull(pullback, chunk.values)
        if not total:
            is_pair = isinstance(pulled, tuple)
            total = tuple(_room_for(part, len(exponents)).zero_() for part in parts_of(pulled))
        place = slice(chunk.shortest + longer - shortest, chunk.longest + longer - shortest + 1)
        scale = chunk.exponents - exponents[place]
        for whole, part in zip(total, parts_of(pulled), strict=True):
            factor = _power_of_two(scale, part)
            if signs is not None:
                factor = factor * signs.to(part.dtype).reshape(1, *signs.shape, *[1] * (part.dim() - 3))
            whole[place].addcmul_(part, factor)
    values = total if is_pair else total[0]
    return Stack(values, exponents, shortest).renormalised()


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Largest magnitude in each row, [length, draw, batch]."""
    if rows.dim() == 3:
        return rows.abs()
    # In the order in which they lie in memory, which is several times faster.
    flat = rows.permute(0, 1, 2, 4, 5, 3).flatten(3) if _is_channels_last(rows) else rows.flatten(3)
    return torch.maximum(flat.amax(3), -flat.amin(3))


def _is_channels_last(rows: torch.Tensor) -> bool:
    image = rows[0, 0] if len(rows) else rows.flatten(0, 1)
    return image.dim() == 4 and image.is_contiguous(memory_format=torch.channels_last)


def _power_of_two(exponents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``2**exponents`` in the dtype of `like`, to be multiplied with it."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    powers = torch.exp2(exponents.to(wide)).to(like.dtype)
    return powers.reshape(*exponents.shape, *[1] * (like.dim() - exponents.dim()))


def _room_for(rows: torch.Tensor, size: int, num_draws: int | None = None) -> torch.Tensor:
    """Uninitialised memory for `size` rows like these, in their layout."""
    leading = (size, rows.shape[1] if num_draws is None else num_draws, rows.shape[2])
    layout = torch.channels_last if _is_channels_last(rows) else torch.contiguous_format
    shape = (math.prod(leading), *rows.shape[3:])
    empty = torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=layout)
    return empty.view(*leading, *shape[1:])


def rows_of(stack: Stack, rows: Sequence[int]) -> Stack:
    """Some rows of a stack whose rows are no lengths but something else, such as single paths.

    Args:
        stack: The stack.
        rows: Their positions, in the order wanted.

    Returns:
        A stack of these rows; the memory is its own.
    """
    index = torch.tensor(rows, device=stack.exponents.device)
    values = each_part(lambda t: t.index_select(0, index), stack.values)
    return replace(stack, values=values, exponents=stack.exponents.index_select(0, index))


def joined(stacks: Sequence[Stack]) -> Stack:
    """The rows of several stacks as one.

    Args:
        stacks: Stacks of one state and one number of draws.

    Returns:
        A stack of all their rows, in this order.
    """
    if len(stacks) == 1:
        return stacks[0]
    values = each_part(lambda *parts: torch.cat(parts), *[s.values for s in stacks])
    return replace(stacks[0], values=values, exponents=torch.cat([s.exponents for s in stacks]))

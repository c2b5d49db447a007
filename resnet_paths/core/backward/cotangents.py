"""Stacks of cotangents, one for each path length: what the backward pass carries from block to block.

Stacks are kept as mantissas and exponents: in float32 the gradient of a path through 54 branches easily falls below
1e-38, where a number becomes 0 without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from resnet_paths._utils.devices import wide
from resnet_paths.core.backward.linearize import Pullback, unchanged

__all__ = ["Cotangents", "Stack", "aligned", "combined", "joined", "placed", "with_more"]

_CHUNK_BYTES = 2**23  # small enough for the caches; larger is no faster
_ZERO = -(2**20)  # the exponent of a row of zeros: below every other


@dataclass(frozen=True)
class Stack:
    """Cotangents of one tensor, apart by path length.

    Where lengths are not counted, the first dimension may stand for something else, such as single paths.

    Attributes:
        values: Mantissas [length, draw, batch, ...].
        exponents: Row (k, d, b) stands for ``values[k, d, b] * 2**exponents[k, d, b]``; int32 [length, draw, batch].
        shortest: Path length of the first row.
    """

    values: torch.Tensor
    exponents: torch.Tensor
    shortest: int = 0

    @classmethod
    def of(cls, cotangent: torch.Tensor, num_rows: int = 1, num_draws: int = 1) -> Stack:
        """A stack of the empty path alone, so many times."""
        exponents = torch.zeros(num_rows, num_draws, len(cotangent), dtype=torch.int32, device=cotangent.device)
        rows = _room_for(cotangent[None, None], num_rows, num_draws)
        return cls(rows.copy_(cotangent.expand(num_rows, num_draws, *cotangent.shape)), exponents).renormalised()

    def __len__(self) -> int:
        """Number of path lengths."""
        return len(self.exponents)

    @property
    def longest(self) -> int:
        """Path length of the last row."""
        return self.shortest + len(self) - 1

    def rows(self, start: int, stop: int) -> Stack:
        """Some of its lengths, by position."""
        return Stack(self.values[start:stop], self.exponents[start:stop], self.shortest + start)

    def up_to(self, longest: int) -> Stack:
        """Its lengths up to `longest`, which may be none."""
        return self if longest >= self.longest else self.rows(0, max(longest - self.shortest + 1, 0))

    def chosen(self, rows: Sequence[int]) -> Stack:
        """Some rows in the order wanted, where rows are not lengths; the memory is their own."""
        index = torch.tensor(rows, device=self.exponents.device)
        return replace(self, values=self.values.index_select(0, index), exponents=self.exponents.index_select(0, index))

    def zeros(self) -> Stack:
        """As many rows of zeros."""
        return replace(self, values=torch.zeros_like(self.values)).renormalised()

    def chunks(self) -> Iterator[Stack]:
        """Runs of lengths small enough for what a branch computes inside."""
        row_bytes = self.values[0].numel() * self.values.element_size()
        size = max(_CHUNK_BYTES // max(row_bytes, 1), 1)
        return (self.rows(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def pulled(self, pullback: Pullback) -> tuple[Stack, dict[str, Stack]]:
        """The stack at the input of a part, given its transposed Jacobian, and what the part reads of the context."""
        if pullback is unchanged or not len(self):
            return self, {}
        pieces = [_pull(pullback, chunk.values) for chunk in self.chunks()]
        values, *read = (column[0] if len(column) == 1 else torch.cat(column) for column in zip(*pieces, strict=True))
        of_context = {name: replace(self, values=v) for name, v in zip(pullback.context, read, strict=True)}
        return replace(self, values=values), of_context

    def log_norms(self) -> torch.Tensor:
        """Logarithms of the Euclidean norms of its rows, float64 [length, draw, batch], on the CPU."""
        squares = wide(torch.zeros_like(self.exponents))
        for k, row in enumerate(self.values):  # row by row: a float64 copy of all would be twice the stack
            squares[k] = wide(row).square() if row.dim() == 2 else wide(row.flatten(2)).square().sum(2)
        return (squares.log() / 2 + wide(self.exponents) * math.log(2)).cpu()

    def renormalised(self, in_place: bool = False) -> Stack:
        """The same cotangents with mantissas far from the ends of the dtype's range; `in_place` in their own memory."""
        if not len(self):
            return self
        largest = _largest(self.values)
        shift = torch.frexp(largest).exponent.to(torch.int32)
        room = 2 if largest.dtype == torch.float16 else 30
        shift = torch.where(shift.abs() > room, shift, 0)
        exponents = torch.where(largest == 0, _ZERO, self.exponents + shift)
        shifted = [row for row, moved in enumerate(shift.flatten(1).any(1).cpu().tolist()) if moved]
        values = self.values if in_place or not shifted else self.values.clone()
        for row in shifted:
            # In two steps: 2**140 is not a float32, though the product may be.
            half = shift[row] // 2
            for power in (-half, half - shift[row]):
                values[row] *= _power_of_two(power, values[row])
        return Stack(values, exponents, self.shortest)


@dataclass(frozen=True)
class Cotangents:
    """Cotangents of a state, and of the context that the blocks above it and the head have read.

    A cotangent of the context is that of the paths that end there. It passes a block through its skip, as it is, so
    that it counts among the paths that take the skips of all blocks below.

    Attributes:
        state: The stack of the state.
        context: A stack for each entry of the context that carries a gradient; of no rows where nothing read it.
    """

    state: Stack
    context: Mapping[str, Stack]

    @classmethod
    def of(
        cls, state: torch.Tensor, context: Mapping[str, torch.Tensor], num_rows: int = 1, num_draws: int = 1
    ) -> Cotangents:
        """Stacks of the empty path alone, so many times."""
        stacks = {name: Stack.of(cotangent, num_rows, num_draws) for name, cotangent in context.items()}
        return cls(Stack.of(state, num_rows, num_draws), stacks)

    def pulled(self, pullback: Pullback) -> Cotangents:
        """Those at the input of a part."""
        state, read = self.state.pulled(pullback)
        return Cotangents(state, with_more(self.context, read))

    def mapped(self, function: Callable[[Stack], Stack]) -> Cotangents:
        """A function taken of every stack."""
        return Cotangents(function(self.state), {name: function(stack) for name, stack in self.context.items()})

    def up_to(self, longest: int | None) -> Cotangents:
        """The lengths up to `longest`; all of them if None."""
        return self if longest is None else self.mapped(lambda stack: stack.up_to(longest))

    def chosen(self, rows: Sequence[int]) -> Cotangents:
        """Some rows in the order wanted, where rows are not lengths."""
        return self.mapped(lambda stack: stack.chosen(rows))

    def without_context(self) -> Cotangents:
        """Those of the state alone, with no rows for the context."""
        empty = {name: stack.rows(0, 0) if len(stack) else stack for name, stack in self.context.items()}
        return Cotangents(self.state, empty)

    def apart(self, names: Sequence[str]) -> tuple[dict[str, Stack], Cotangents]:
        """Some entries of the context, and all else, with no rows for these."""
        found = {name: self.context[name] for name in names}
        empty = {name: stack.rows(0, 0) for name, stack in found.items()}
        return found, Cotangents(self.state, {**self.context, **empty})

    def with_zero_context(self) -> Cotangents:
        """Those of the state alone, with rows of zeros for the context."""
        return Cotangents(self.state, {name: stack.zeros() for name, stack in self.context.items()})


def with_more(
    context: Mapping[str, Stack], more: Mapping[str, Stack], signs: torch.Tensor | None = None, longer: int = 0
) -> dict[str, Stack]:
    """Cotangents of the context with those added that a part has read; arguments as of `combined`."""
    found = dict(context)
    for name, stack in more.items():
        if len(stack):
            found[name] = combined(found[name], stack, unchanged, signs, longer)[0]
    return found


def combined(
    through_skip: Stack | None, source: Stack, pullback: Pullback, signs: torch.Tensor | None = None, longer: int = 1
) -> tuple[Stack, dict[str, Stack]]:
    """``through_skip[k] + signs * pullback(source[k - longer])`` for every length k: what leaves a residual block.

    Args:
        through_skip: Cotangents that took the skip; None, or no rows, where there are none.
        source: Cotangents above the branch.
        pullback: Transposed Jacobian of the branch.
        signs: Numbers [draw, batch], or None for 1.
        longer: What the branch adds to the length of a path.

    Returns:
        The stack at the block's input; and what the branch has read of the context, at the lengths and without the
        signs of `source`.
    """
    shortest, longest = source.shortest + longer, source.longest + longer
    if through_skip is not None and not len(through_skip):
        through_skip = None
    if through_skip is not None:
        shortest, longest = min(shortest, through_skip.shortest), max(longest, through_skip.longest)
    exponents = source.exponents.new_full((longest - shortest + 1, *source.exponents.shape[1:]), _ZERO)
    for stack, shift in [(source, longer)] if through_skip is None else [(through_skip, 0), (source, longer)]:
        place = slice(stack.shortest + shift - shortest, stack.longest + shift - shortest + 1)
        exponents[place] = torch.maximum(exponents[place], stack.exponents)
    total = None
    if through_skip is not None:
        start, stop = through_skip.shortest - shortest, through_skip.longest - shortest + 1
        scale = _power_of_two(through_skip.exponents - exponents[start:stop], through_skip.values)
        total = _room_for(through_skip.values, len(exponents))
        total[:start] = 0
        torch.mul(through_skip.values, scale, out=total[start:stop])
        total[stop:] = 0
    read: list[list[torch.Tensor]] = []
    for chunk in source.chunks():
        pulled, *of_context = _pull(pullback, chunk.values)
        read.append(of_context)
        if total is None:
            total = _room_for(pulled, len(exponents)).zero_()
        place = slice(chunk.shortest + longer - shortest, chunk.longest + longer - shortest + 1)
        factor = _power_of_two(chunk.exponents - exponents[place], pulled)
        if signs is not None:
            factor = factor * signs.to(pulled.dtype).reshape(1, *signs.shape, *[1] * (pulled.dim() - 3))
        total[place].addcmul_(pulled, factor)
    assert total is not None  # the source has rows
    stacks = (replace(source, values=torch.cat(pieces)) for pieces in zip(*read, strict=True))
    found = Stack(total, exponents, shortest).renormalised(in_place=True)
    return found, dict(zip(pullback.context, stacks, strict=True))


def _pull(pullback: Pullback, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`pullback` with lengths and draws as one stack."""
    pieces = pullback.of_all(values.flatten(0, 1))
    return tuple(piece.view(*values.shape[:2], *piece.shape[1:]) for piece in pieces)


def aligned(stacks: Sequence[Stack]) -> list[Stack]:
    """The same cotangents with exponents and lengths in common.

    Args:
        stacks: Stacks of one number of draws and examples; some may have no rows.

    Returns:
        A stack for each, with zeros where it had no row.
    """
    present = [stack for stack in stacks if len(stack)]
    if len(stacks) == 1 or not present:
        return list(stacks)
    shortest, longest = min(s.shortest for s in present), max(s.longest for s in present)
    exponents = present[0].exponents.new_full((longest - shortest + 1, *present[0].exponents.shape[1:]), _ZERO)
    places = [slice(s.shortest - shortest, s.longest - shortest + 1) if len(s) else slice(0) for s in stacks]
    for stack, place in zip(stacks, places, strict=True):
        exponents[place] = torch.maximum(exponents[place], stack.exponents)
    found = []
    for stack, place in zip(stacks, places, strict=True):
        values = _room_for(stack.values, len(exponents)).zero_()
        values[place] = stack.values * _power_of_two(stack.exponents - exponents[place], stack.values)
        found.append(Stack(values, exponents, shortest))
    return found


def joined(stacks: Sequence[Cotangents]) -> Cotangents:
    """The rows of several stacks one after the other, where rows are not lengths.

    Args:
        stacks: Cotangents of one state and one number of draws.

    Returns:
        Cotangents of all their rows, in this order.
    """
    if len(stacks) == 1:
        return stacks[0]
    names = stacks[0].context
    return Cotangents(
        _in_a_row([s.state for s in stacks]), {name: _in_a_row([s.context[name] for s in stacks]) for name in names}
    )


def _in_a_row(stacks: Sequence[Stack]) -> Stack:
    values, exponents = torch.cat([s.values for s in stacks]), torch.cat([s.exponents for s in stacks])
    return replace(stacks[0], values=values, exponents=exponents)


def placed(stack: Cotangents, pieces: Sequence[tuple[list[int], Cotangents]]) -> Cotangents:
    """Cotangents with some rows replaced; all of them where their shape changed.

    Args:
        stack: The cotangents; their memory is used up.
        pieces: Positions of rows, and what replaces these.

    Returns:
        Cotangents of as many rows.
    """
    if sum(len(rows) for rows, _ in pieces) < len(stack.state):
        for rows, piece in pieces:
            _place(stack.state, rows, piece.state)
            for name, part in piece.context.items():
                _place(stack.context[name], rows, part)
        return stack
    order = [row for rows, _ in pieces for row in rows]
    together = joined([piece for _, piece in pieces])
    return together if order == sorted(order) else together.chosen(sorted(range(len(order)), key=order.__getitem__))


def _place(whole: Stack, rows: Sequence[int], part: Stack) -> None:
    index = torch.tensor(rows, device=whole.exponents.device)
    whole.exponents.index_copy_(0, index, part.exponents)
    whole.values.index_copy_(0, index, part.values)


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Largest magnitude in each row, [length, draw, batch]."""
    if rows.dim() == 3:
        return rows.abs()
    # In the order of their memory, which is several times faster.
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

"""What passes through each block's branch, in one direction: one sweep of cotangents back, one of tangents forward.

With v_i the gradient at the output of block i, and t_i the tangent at its input of a direction d at the place where the
gradient is wanted, the part of the gradient that takes the branch of block i has the inner product
``<v_i after the post, J_i t_i>`` with d: n block VJPs and n Jacobian-vector products for all blocks. What the branch
of block i makes of t_i is a tangent of its own at the blocks that follow, where it has such products with the part that
takes the branches of both: n (n - 1) / 2 Jacobian-vector products more for all pairs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from resnet_paths._utils.devices import wide
from resnet_paths.core.backward.cotangents import Cotangents, Stack
from resnet_paths.core.backward.linearize import Context, Pullback, expanded, linearize
from resnet_paths.core.backward.tangents import DIFFERENTIABLE_PULLBACKS, pushed
from resnet_paths.core.chain import Block, ResidualChain

__all__ = ["Tangents", "products_through_branches"]


@dataclass(frozen=True)
class Tangents:
    """Directions of the state, and of what the blocks read of the context.

    Attributes:
        state: [row, batch, ...].
        context: By name, [row, batch, ...].
        exponents: The direction of an example is this times ``2**exponents``, int32 [row, batch].
    """

    state: torch.Tensor
    context: Mapping[str, torch.Tensor]
    exponents: torch.Tensor

    def renormalised(self, state: torch.Tensor) -> Tangents:
        """Those with another state, its numbers far from the ends of the dtype's range."""
        shift = Stack(state[:, None], torch.zeros_like(self.exponents)[:, None]).renormalised().exponents[:, 0]
        shift = shift.clamp(min=-1000)  # of zeros
        scale = torch.exp2(-wide(shift))

        def scaled(tensor: torch.Tensor) -> torch.Tensor:
            return tensor * scale.to(tensor.dtype).to(tensor.device).reshape(*shift.shape, *[1] * (tensor.dim() - 2))

        if not bool((shift != 0).any()):
            return Tangents(state, self.context, self.exponents)
        context = {name: scaled(tensor) for name, tensor in self.context.items()}
        return Tangents(scaled(state), context, self.exponents + shift)

    def with_row(self, is_whole: bool) -> Tangents:
        """With another row, of what passed the branch of a block.

        Args:
            is_whole: Whether that is all of the first row, as where there is no skip. If not, the context of that row,
                which leads around the branch, is no part of it.

        Returns:
            The tangents; the state is that before the block.
        """
        context = {
            name: torch.cat([tensor, tensor[:1] if is_whole else torch.zeros_like(tensor[:1])])
            for name, tensor in self.context.items()
        }
        return Tangents(self.state, context, torch.cat([self.exponents, self.exponents[:1]]))


@torch.no_grad()
def products_through_branches(
    chain: ResidualChain,
    states: Sequence[torch.Tensor],
    context: Context,
    above: Sequence[Cotangents],
    direction: Tangents,
    *,
    pairs: bool = False,
    down_to: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inner products of a direction with the part of the gradient that takes the branch of each block.

    Args:
        chain: The chain.
        states: From `resnet_paths.core.backward.forward`.
        context: What the blocks read in addition to the states.
        above: The whole gradient at the output of each block from `down_to` on, in one row.
        direction: At the input of block `down_to`, in one row.
        pairs: Whether to give the parts through the branches of two blocks as well.
        down_to: The first block.

    Yields:
        For each block, first to last: the product for each example, float64 [row, batch], and the power of 2 that it
        has to be multiplied with. With `pairs`, the rows after the first are those of the part that takes the branch of
        an earlier block too, in the order of these.
    """
    for index, cotangents in zip(range(down_to, len(chain)), above, strict=True):
        with DIFFERENTIABLE_PULLBACKS:
            pushed_block = _PushedBlock.of(chain[index], states[index], context, direction, adds_row=pairs)
        behind = cotangents.pulled(pushed_block.post)
        factors = [(behind.state, pushed_block.branches)]
        if chain[index].skip is None:  # hands the cotangents of the context on through its branch
            factors += [(stack, direction.context[name]) for name, stack in behind.context.items()]
        exponents = behind.state.exponents[0, 0]
        product = wide(torch.zeros_like(direction.exponents))
        for stack, tangent in factors:
            if len(stack) and tangent is not None:
                one = (wide(stack.values[0, 0]) * wide(tangent)).flatten(2).sum(2)
                product = product + torch.ldexp(one, wide(stack.exponents[0, 0] - exponents).to(one.device))
        yield product, exponents + direction.exponents
        if pairs:
            direction = direction.with_row(chain[index].skip is None)
        direction = direction.renormalised(pushed_block.output)


@dataclass(frozen=True)
class _PushedBlock:
    """Tangents of a block: of its branches together, and of its output; the pullback of its post."""

    branches: torch.Tensor | None
    output: torch.Tensor
    value: torch.Tensor
    post: Pullback

    @classmethod
    def of(
        cls, block: Block, state: torch.Tensor, context: Context, direction: Tangents, *, adds_row: bool = False
    ) -> _PushedBlock:
        shared, tangent = _pushed(block.pre, state, context, direction.state, direction.context)
        parts = [part for part in (block.skip, *block.branches) if part is not None]
        found = [_pushed(part, shared, context, tangent, direction.context) for part in parts]
        total = functools.reduce(operator.add, [value for value, _ in found])
        output, post = linearize(block.post, total, context)
        nothing = torch.zeros_like(total)[None]
        has_skip = block.skip is not None
        of_parts = [expanded(tangents, total) for _, tangents in found]
        of_branches = functools.reduce(operator.add, of_parts[has_skip:], nothing)
        summed = of_branches + of_parts[0] if has_skip else of_branches
        after = direction
        if adds_row:
            summed, after = torch.cat([summed, of_branches[:1].expand_as(summed[:1])]), direction.with_row(not has_skip)
        return cls(of_branches if block.branches else None, pushed(post, output, summed, after.context), output, post)


def _pushed(
    part: nn.Module,
    state: torch.Tensor,
    context: Context,
    tangent: torch.Tensor,
    of_context: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a part, and its tangent; of a chain inside a branch, block by block."""
    if not isinstance(part, ResidualChain) or not len(part):
        output, pullback = linearize(part, state, context)
        return output, pushed(pullback, output, tangent, of_context)
    state, tangent = _pushed(part.stem, state, context, tangent, of_context)
    for block in part:
        direction = Tangents(tangent, of_context, torch.zeros(len(tangent), len(state), dtype=torch.int32))
        inside = _PushedBlock.of(block, state, context, direction)
        state, tangent = inside.value, inside.output
    return _pushed(part.head, state, context, tangent, of_context)

"""What skips and branches do to the norm of the gradient: one ordinary backward pass, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from resnet_paths.core.backward.cotangents import Stack, combined
from resnet_paths.core.backward.linearize import Context, Pullback, unchanged
from resnet_paths.core.backward.recursion import LinearBlock, NestedChain
from resnet_paths.core.chain import ResidualChain

__all__ = ["Gains", "gains"]

Gains: TypeAlias = "list[list[tuple[torch.Tensor, Gains | None]]]"
"""For each block, for its skip (where it has one) and each branch, in the order of ``Block.path_choices``: logarithms
of the norms of each example's gradient after it, float64 [batch]; and the gains of the chain that the branch holds."""


@torch.no_grad()
def gains(
    chain: ResidualChain, states: Sequence[torch.Tensor], context: Context, whole: Stack, *, down_to: int = 0
) -> tuple[Gains, Stack]:
    """Norms of the whole gradient after the skip and after each branch of every block.

    Args:
        chain: The chain.
        states: From `resnet_paths.core.backward.forward`.
        context: What the blocks read in addition to the states; gradients through it are left out.
        whole: Gradient at the last block's output, in one row.
        down_to: The block at whose input to stop.

    Returns:
        The gains of the blocks from `down_to` on, first to last; the gradient at the input of block `down_to`.
    """
    found: Gains = []
    for index in reversed(range(down_to, len(chain))):
        block = LinearBlock.at(chain[index], states[index], context)
        above, _ = whole.pulled(block.post)
        total: Stack | None = None
        of_block: list[tuple[torch.Tensor, Gains | None]] = []
        parts: list[Pullback | NestedChain] = [*([] if block.skip is None else [block.skip]), *block.branches]
        for part in parts:
            inner = None
            if isinstance(part, NestedChain):
                at_head, _ = above.pulled(part.head)
                inner, behind = gains(part.chain, part.states, part.context, at_head)
                below, _ = behind.pulled(part.stem)
            else:
                below, _ = above.pulled(part)
            of_block.append((below.log_norms()[0, 0], inner))
            total = below if total is None else combined(total, below, unchanged, longer=0)[0]
        assert total is not None  # held by Block
        whole = total.pulled(block.pre)[0].renormalised()
        found.insert(0, of_block)
    return found, whole

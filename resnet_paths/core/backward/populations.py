"""Populations of paths: at every block each path splits in two, and as many are kept as before.

Of every example some paths go down the blocks together, with their cotangents. Where a path meets a block it becomes
one path for each entry that the block offers; then a random choice is made among all of these, and those that are kept
have their weights divided by the probability of that (splitting, as in a particle filter). Sums over the population
with these weights are unbiased estimates of sums over all paths, whatever decides the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from resnet_paths.core.backward.completions import Completions, completions
from resnet_paths.core.backward.cotangents import Cotangents, Stack, joined
from resnet_paths.core.backward.gains import Gains
from resnet_paths.core.backward.linearize import Context, Pullback
from resnet_paths.core.backward.recursion import LinearBlock, NestedChain
from resnet_paths.core.chain import ResidualChain

__all__ = ["Choose", "Population", "pull_population"]


@dataclass(frozen=True)
class Population:
    """Some paths of each example, from the head down to where they are.

    Attributes:
        cotangents: One row for each path, which is another path in each example.
        lengths: Path lengths so far, [row, batch].
        log_weights: Logarithms of the weights, [row, batch]; -inf where there is no path.
        num_block_vjps: Block VJPs for an example so far.
    """

    cotangents: Cotangents
    lengths: np.ndarray
    log_weights: np.ndarray
    num_block_vjps: int = 0

    @classmethod
    def of(cls, cotangents: Cotangents) -> Population:
        """The empty path alone."""
        shape = (1, cotangents.state.exponents.shape[2])
        return cls(cotangents, np.zeros(shape, dtype=int), np.zeros(shape))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def pulled(self, pullback: Pullback) -> Population:
        """The same paths at the input of a part."""
        return replace(self, cotangents=self.cotangents.pulled(pullback))

    def chosen(self, rows: np.ndarray, log_probabilities: np.ndarray) -> Population:
        """Rows of each example, and the probabilities with which they were chosen.

        Args:
            rows: Positions, [row, batch].
            log_probabilities: [row, batch]; +inf where none was chosen.

        Returns:
            These paths with their new weights.
        """
        device = self.cotangents.state.exponents.device
        index = torch.from_numpy(rows).to(device)
        examples = torch.arange(rows.shape[1], device=device)

        def of(stack: Stack) -> Stack:
            return Stack(stack.values[index, 0, examples][:, None], stack.exponents[index, 0, examples][:, None])

        return Population(
            self.cotangents.mapped(of),
            np.take_along_axis(self.lengths, rows, 0),
            np.take_along_axis(self.log_weights, rows, 0) - log_probabilities,
            self.num_block_vjps,
        )

    def log_norms(self) -> np.ndarray:
        """Logarithms of the norms of the cotangents of each path, float64 [row, batch]."""
        stacks = [self.cotangents.state, *self.cotangents.context.values()]
        logs: np.ndarray = np.logaddexp.reduce([2 * stack.log_norms()[:, 0].numpy() for stack in stacks if len(stack)])
        return logs / 2


Choose: TypeAlias = Callable[[Population, Completions], Population]
"""From all paths at the input of a block, and the completions of the blocks below, to those that are kept."""


@torch.no_grad()
def pull_population(
    chain: ResidualChain,
    states: Sequence[torch.Tensor],
    context: Context,
    above: Population,
    gains: Gains,
    below: Completions,
    choose: Choose,
    *,
    down_to: int = 0,
) -> Population:
    """A population pulled back through the blocks of a chain.

    Args:
        chain: The chain.
        states: From `resnet_paths.core.backward.forward`, or the states inside a nested chain.
        context: What the blocks read in addition to the states.
        above: The population at the last block's output.
        gains: From `resnet_paths.core.backward.gains`, of the blocks from `down_to` on.
        below: What is expected of the blocks below block `down_to`.
        choose: What makes the choice at the input of every block but the first.
        down_to: The block at whose input to stop.

    Returns:
        The population at the input of block `down_to`.
    """
    choices = [chain[index].path_choices for index in range(down_to, len(chain))]
    expected = completions(gains, choices, below)
    for index in reversed(range(down_to, len(chain))):
        block = LinearBlock.at(chain[index], states[index], context)
        above = above.pulled(block.post)
        children = [] if block.skip is None else [above.pulled(block.skip)]
        for number, branch in enumerate(block.branches):
            # A path takes the context with it through the skip, or through the first branch.
            first = block.skip is None and number == 0
            start = replace(
                above,
                cotangents=above.cotangents if first else above.cotangents.with_zero_context(),
                lengths=above.lengths + 1,
            )
            if isinstance(branch, NestedChain):
                inner = gains[index - down_to][number + (block.skip is not None)][1]
                assert inner is not None  # as for every chain in a branch
                inside = pull_population(
                    branch.chain,
                    branch.states,
                    branch.context,
                    start.pulled(branch.head),
                    inner,
                    expected[index - down_to],
                    choose,
                )
                children.append(inside.pulled(branch.stem))
            else:
                pulled = start.pulled(branch)
                children.append(replace(pulled, num_block_vjps=pulled.num_block_vjps + len(start)))
        above = _together(children, above.num_block_vjps).pulled(block.pre)
        if index > down_to:
            above = choose(above, expected[index - down_to])
    return above


def _together(parts: Sequence[Population], before: int) -> Population:
    cotangents = joined([part.cotangents for part in parts]).mapped(Stack.renormalised)
    return Population(
        cotangents,
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.log_weights for part in parts]),
        before + sum(part.num_block_vjps - before for part in parts),
    )

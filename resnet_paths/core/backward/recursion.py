"""The backward pass with the cotangents of different paths kept apart.

At a fixed forward pass the backward pass is linear, so the gradient is a sum over paths: each takes, at every block,
the transposed Jacobian of the skip or that of the branch (Veit et al. 2016, section 4.3). Paths of one length are
carried together, as a stack of cotangents from the last block to the first:

    v[k] at a block's input = P^T v[k] + J^T v[k-1]        P: Jacobian of post * skip, J: of post * branch

which costs n (n + 1) / 2 block VJPs for all 2^n paths. What a branch reads of the context has a gradient of the same
lengths, c[k] = c[k] + C^T v[k-1] with C the Jacobian with respect to the context: it counts among the paths that take
that branch last, and the skips of all blocks below. A block without a skip hands c on through its first branch.

Only states between blocks are kept from the forward pass; a block's inside is computed again when the backward pass
reaches it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.threads import requiring_gradients
from resnet_paths.core.backward.cotangents import Cotangents, Stack, combined, joined, placed, with_more
from resnet_paths.core.backward.forward import states_from
from resnet_paths.core.backward.linearize import Context, Pullback, broadcast, linearize, unchanged, vjp_of_each
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import call_part, context_read_by
from resnet_paths.core.paths import Path, branch_number

__all__ = [
    "Linearizer",
    "Rules",
    "head_cotangents",
    "parameter_cotangents",
    "parts_through_blocks",
    "pull_back",
    "pull_paths",
]


def head_cotangents(
    chain: ResidualChain, state: torch.Tensor, context: Context, losses_of: Callable[[Any], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradient of each example's own loss at the last block's output, and at the context that the head reads.

    Args:
        chain: The chain; only its head is run.
        state: Output of the last block.
        context: The context.
        losses_of: From what the head returns to losses [batch].

    Returns:
        The gradient in the shape of `state`; and one for each entry of the context that carries a gradient.

    Raises:
        ResnetPathsError: If the loss is not one number per example, or not finite.
    """
    leaves = [t.detach().clone() for t in (state, *(context.values[name] for name in context.carrying))]
    leaves = [leaf.requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    with torch.enable_grad():
        given = {**context.values, **dict(zip(context.carrying, leaves[1:], strict=True))}
        losses = losses_of(call_part(chain.head, leaves[0].clone(), given))
        total = losses.sum() if isinstance(losses, torch.Tensor) else None
    size = len(state)
    if not isinstance(losses, torch.Tensor) or losses.shape != (size,):
        found = list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise ResnetPathsError(
            "loss",
            found,
            f"one number per example, a tensor of shape [{size}]",
            "Pass loss=lambda logits, targets: ... with reduction='none'.",
        )
    if not bool(torch.isfinite(losses).all()):
        raise ResnetPathsError("loss", "NaN or infinity", "a finite loss for every example")
    # A loss that does not depend on the state at all has the gradient 0.
    slopes: list[torch.Tensor | None] = [None] * len(leaves)
    if total is not None and total.requires_grad:
        slopes = list(torch.autograd.grad(total, leaves, allow_unused=True))
    first, *others = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, slopes, strict=True))
    return first, dict(zip(context.carrying, others, strict=True))


Linearizer: TypeAlias = Callable[[nn.Module, torch.Tensor, Context], tuple[torch.Tensor, Pullback]]
"""From a part of a block, its input and the context to its output and pullback, as `linearize`."""


@dataclass(frozen=True)
class Rules:
    """How cotangents are kept apart on their way back.

    Attributes:
        counted: Whether a branch makes a path longer; if not, all paths stay together.
        longest: Path length beyond which nothing is computed; None for all.
        draw_signs: Called once for each branch of each block; a number for each draw and example, [draw, batch].
        constants: Names of the context that stand for constants of parts. Paths begin there: a block without a skip
            below does not make them longer.
        moments: Whether row j is the sum over lengths k of C(k, j) times the gradient of the paths of length k: with a
            factor ``t = 1 + x`` on every branch, the coefficient of ``x^j``. `longest` is the highest order.
        linearizer: From the position of a block and the name of a part, such as ``"branch"``, to what linearizes it;
            parts of a chain inside a branch belong to that branch.
    """

    counted: bool = True
    longest: int | None = None
    draw_signs: Callable[[], torch.Tensor] | None = None
    constants: tuple[str, ...] = ()
    moments: bool = False
    linearizer: Callable[[int, str], Linearizer] = lambda _block, _part: linearize


@torch.no_grad()
def pull_back(
    chain: ResidualChain,
    states: Sequence[torch.Tensor],
    context: Context,
    above: Cotangents,
    rules: Rules,
    *,
    down_to: int = 0,
    up_from: int | None = None,
) -> Cotangents:
    """Cotangents pulled back through blocks.

    Args:
        chain: The chain.
        states: From `resnet_paths.core.backward.forward`.
        context: What the blocks read in addition to the states.
        above: Cotangents at the output of block ``up_from - 1``.
        rules: What to keep apart.
        down_to: The block at whose input to stop.
        up_from: The block above which to start; None for the end of the chain.

    Returns:
        The cotangents at the input of block `down_to`; of no length at all if `rules.longest` allows none.
    """
    for index in reversed(range(down_to, len(chain) if up_from is None else up_from)):
        of_part = functools.partial(rules.linearizer, index)
        block = LinearBlock.at(chain[index], states[index], context, of_part)
        above = _below_post(block, above.pulled(block.post), rules).up_to(rules.longest)
        if not len(above.state):
            break
    return above


def _below_post(block: LinearBlock, above: Cotangents, rules: Rules) -> Cotangents:
    """From the sum of a block's skip and branches to its input."""
    state, context = None, above.without_context().context
    if block.skip is not None:
        through_skip = above.pulled(block.skip)
        state, context = through_skip.state, through_skip.context
        above = above.without_context()
    elif rules.constants:
        constants, above = above.apart(rules.constants)
        context = {**context, **constants}
    # Only lengths that may still grow.
    to_branch = above if rules.longest is None or rules.moments else above.up_to(rules.longest - 1)
    for branch in block.branches if len(to_branch.state) else []:
        signs = None if rules.draw_signs is None else rules.draw_signs()
        if isinstance(branch, NestedChain):
            source, pullback = branch.pulled(to_branch, rules), unchanged
        else:
            source, pullback = to_branch, branch
        if rules.moments:
            source, pullback = source.pulled(pullback), unchanged
            state = combined(state, source.state, pullback, longer=0)[0]
            context = with_more(context, source.context)
        if len(source.state):
            state, read = combined(state, source.state, pullback, signs, int(rules.counted))
            context = with_more(context, read, signs, int(rules.counted))
        context = with_more(context, source.context, signs, int(rules.counted))
        to_branch = to_branch.without_context()
    if state is None:
        return Cotangents(above.state.rows(0, 0), context)
    found = Cotangents(state, context).pulled(block.pre)
    if not len(to_branch.state) or not block.branches or block.pre is not unchanged:
        return Cotangents(found.state.renormalised(), found.context)
    return found


@dataclass(frozen=True)
class LinearBlock:
    """A block at a point: the transposed Jacobians of its parts; a `NestedChain` where a branch holds a chain."""

    pre: Pullback
    skip: Pullback | None
    branches: list[Pullback | NestedChain]
    post: Pullback

    @classmethod
    def at(
        cls,
        block: Block,
        state: torch.Tensor,
        context: Context,
        of_part: Callable[[str], Linearizer] = lambda _part: linearize,
    ) -> LinearBlock:
        """The block at its input `state`; `of_part` gives what linearizes a part, by the name of the part."""
        shared, pre = of_part("pre")(block.pre, state, context)
        skipped, skip = (None, None) if block.skip is None else of_part("skip")(block.skip, shared, context)
        found: list[tuple[torch.Tensor, Pullback | NestedChain]] = []
        for branch in block.branches:
            if isinstance(branch, ResidualChain) and len(branch):
                nested = NestedChain.at(branch, shared, context, of_part("branch"))
                found.append((nested.output, nested))
            else:
                found.append(of_part("branch")(branch, shared, context))
        outputs = [output for output, _ in found]
        total = functools.reduce(operator.add, outputs if skipped is None else [skipped, *outputs])
        if skip is not None and skipped is not None:
            skip = broadcast(skip, skipped, total)
        branches = [
            replace(pulls, head=broadcast(pulls.head, output, total))
            if isinstance(pulls, NestedChain)
            else broadcast(pulls, output, total)
            for output, pulls in found
        ]
        return cls(pre, skip, branches, of_part("post")(block.post, total, context)[1])


@dataclass(frozen=True)
class NestedChain:
    """A chain inside a branch, at a point; it reads the context of the chain around it."""

    chain: ResidualChain
    states: list[torch.Tensor]
    context: Context
    linearizer: Linearizer
    stem: Pullback
    head: Pullback
    output: torch.Tensor

    @classmethod
    def at(
        cls, chain: ResidualChain, state: torch.Tensor, context: Context, linearizer: Linearizer = linearize
    ) -> NestedChain:
        """The chain at its input `state`."""
        first, stem = linearizer(chain.stem, state, context)
        states = states_from(first, chain, context.values)
        output, head = linearizer(chain.head, states[-1], context)
        return cls(chain, states, context, linearizer, stem, head, output)

    def pulled(self, above: Cotangents, rules: Rules) -> Cotangents:
        """Cotangents of its output at its input."""
        # Its own branch is one block of the path already.
        longest = rules.longest if rules.longest is None or rules.moments else rules.longest - 1
        inner = replace(rules, longest=longest, linearizer=lambda _block, _part: self.linearizer)
        return pull_back(self.chain, self.states, self.context, above.pulled(self.head), inner).pulled(self.stem)


@torch.no_grad()
def pull_paths(
    chain: ResidualChain,
    states: Sequence[torch.Tensor],
    context: Context,
    above: Cotangents,
    paths: Sequence[Path],
    *,
    down_to: int = 0,
) -> Cotangents:
    """Cotangents pulled back along single paths, all at once: a path of length k costs k block VJPs.

    Args:
        chain: The chain.
        states: From `resnet_paths.core.backward.forward`, or the states inside a nested chain.
        context: What the blocks read in addition to the states.
        above: Cotangents at the last block's output, one row per path; their memory is used up.
        paths: A path a row, through the blocks from `down_to` on.
        down_to: The block at whose input to stop.

    Returns:
        The cotangents at the input of block `down_to`, one row per path.
    """
    for index in reversed(range(down_to, len(chain))):
        block = LinearBlock.at(chain[index], states[index], context)
        above = above.pulled(block.post)
        entries = [path[index - down_to] for path in paths]
        rows_of_entry: dict[int, list[int]] = {}
        for row, entry in enumerate(entries):
            rows_of_entry.setdefault(branch_number(entry), []).append(row)
        pieces = []
        for entry, rows in rows_of_entry.items():
            if not entry and block.skip is unchanged:
                continue  # they stay where they are
            piece = above if len(rows) == len(paths) else above.chosen(rows)
            if entry > 1 or (entry and block.skip is not None):  # the context takes the skip, or the first branch
                piece = piece.with_zero_context()
            branch = block.branches[entry - 1] if entry else block.skip
            if isinstance(branch, NestedChain):
                inner = [cast("Path", entries[row]) for row in rows]
                inside = pull_paths(branch.chain, branch.states, context, piece.pulled(branch.head), inner)
                pieces.append((rows, inside.pulled(branch.stem)))
            else:
                assert branch is not None  # the paths were drawn from the block's choices
                piece = piece.pulled(branch)
                pieces.append((rows, Cotangents(piece.state.renormalised(), piece.context)))
        above = placed(above, pieces).pulled(block.pre)
    return above


@torch.no_grad()
def parts_through_blocks(
    chain: ResidualChain, states: Sequence[torch.Tensor], context: Context, whole: Cotangents, *, down_to: int = 0
) -> Cotangents:
    """The whole gradient, and the part of it that passes through each block's branch.

    Args:
        chain: The chain.
        states: From `resnet_paths.core.backward.forward`.
        context: What the blocks read in addition to the states.
        whole: Gradient at the last block's output, in one row.
        down_to: The block at whose input to stop.

    Returns:
        Cotangents at the input of block `down_to`: a row for the whole gradient, then one per block, last block first.
    """
    together = Rules(counted=False)
    rows = whole
    for index in reversed(range(down_to, len(chain))):
        block = LinearBlock.at(chain[index], states[index], context)
        above = rows.pulled(block.post)
        through_branch = above.chosen([0])
        if not block.branches:
            through_branch = through_branch.mapped(Stack.zeros)
        elif block.skip is not None:
            through_branch = through_branch.with_zero_context()
        only = replace(block, skip=None) if block.branches else block
        rows = joined([_below_post(block, above, together), _below_post(only, through_branch, together)])
    return rows


@torch.no_grad()
def parameter_cotangents(
    block: Block, state: torch.Tensor, context_of: Callable[[int], Mapping[str, torch.Tensor]], stack: Stack
) -> Stack:
    """Gradients of each example for a block's parameters, given cotangents of the block's output.

    Args:
        block: The block.
        state: Its input.
        context_of: From the position of an example to the context of that example alone.
        stack: Cotangents of its output.

    Returns:
        A stack of vectors: the gradients for all parameters of the block, end to end, in the order in which
        ``block.named_parameters()`` gives them.
    """
    # Not functional_call, which for a moment puts other tensors into the block that all threads share.
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    names = context_read_by(block)
    columns = []
    for example in range(stack.exponents.shape[2]):
        context = {name: value for name, value in context_of(example).items() if name in names} if names else {}
        rows = stack.values[:, :, example : example + 1].flatten(0, 1)
        with requiring_gradients(parameters):
            with torch.enable_grad():
                output = block(state[example : example + 1].clone(), **context)
            live = [output] if output.requires_grad else []
            found = vjp_of_each(live, parameters, [rows] * len(live), len(rows))
        columns.append(torch.cat([gradient.flatten(1) for gradient in found], 1))
    values = torch.stack(columns, 1).view(*stack.exponents.shape, -1)
    return replace(stack, values=values).renormalised()

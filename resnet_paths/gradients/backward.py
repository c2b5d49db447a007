"""The backward pass with the cotangents of different paths kept apart.

At a fixed forward pass the backward pass is linear, so the gradient is a sum over paths: each takes, at every block,
the transposed Jacobian of the skip or that of the branch (Veit et al. 2016, section 4.3). Paths of one length are
carried together, as a stack of cotangents from the last block to the first:

    v[k] at a block's input = P^T v[k] + J^T v[k-1]        P: Jacobian of post * skip, J: of post * branch

which costs n (n + 1) / 2 block VJPs for all 2^n paths. Only states between blocks are kept from the forward pass; a
block's inside is computed again when the backward pass reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.inputs import call, each_tensor
from resnet_paths.core.parts import Parallel
from resnet_paths.core.paths import Path
from resnet_paths.gradients.adjoints import Pullback, each_part, linearize, unchanged
from resnet_paths.gradients.cotangents import Stack, combined, joined, parts_of, rows_of

__all__ = [
    "Rules",
    "head_cotangent",
    "parameter_cotangents",
    "parts_through_blocks",
    "pull_back",
    "pull_paths",
    "states_of",
]


def states_of(chain: ResidualChain, inputs: Any) -> list[Any]:
    """The states between blocks of an ordinary forward pass.

    Args:
        chain: The chain.
        inputs: A batch, as the chain is called: a tensor, a tuple or a mapping.

    Returns:
        The output of the stem, then that of each block.

    Raises:
        ResnetPathsError: If a value is not finite; the first block whose output holds one is named.
    """
    with torch.no_grad():
        # Parts written by hand may begin with an operation in place: they get copies.
        first = call(chain.stem, inputs if chain.eval_only else each_tensor(torch.clone, inputs))
    _check_finite("the stem", first)
    return _states_from(first, chain)


@torch.no_grad()
def _states_from(state: Any, chain: ResidualChain) -> list[Any]:
    """The state at the first block, and that behind each."""
    own = unchanged if chain.eval_only else _copy
    states = [state]
    for index, block in enumerate(chain):
        states.append(block(own(states[-1])))
        _check_finite(f"block {block.name or index!r}", states[-1])
    return states


def _copy(state: Any) -> Any:
    return each_part(torch.clone, state)


def _check_finite(place: str, state: Any) -> None:
    for part in parts_of(state):
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            raise ResnetPathsError(
                "inputs",
                f"NaN or infinity in the output of {place}",
                "inputs whose activations are all finite",
                "In half precision, large activations overflow: try float32.",
            )


def head_cotangent(chain: ResidualChain, state: Any, losses_of: Callable[[Any], torch.Tensor]) -> Any:
    """Gradient of each example's own loss at the last block's output.

    Args:
        chain: The chain; only its head is run.
        state: Output of the last block.
        losses_of: From what the head returns to losses [batch].

    Returns:
        The gradient, in the shape of `state`.

    Raises:
        ResnetPathsError: If the loss is not one number an example, or not finite.
    """
    leaves = tuple(part.detach().clone().requires_grad_(part.is_floating_point()) for part in parts_of(state))
    with torch.enable_grad():
        losses = losses_of(chain.head(_copy(leaves if isinstance(state, tuple) else leaves[0])))
        total = losses.sum() if isinstance(losses, torch.Tensor) else None
    size = len(leaves[0])
    if not isinstance(losses, torch.Tensor) or losses.shape != (size,):
        found = list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise ResnetPathsError(
            "loss",
            found,
            f"one number an example, a tensor of shape [{size}]",
            "Pass loss=lambda logits, targets: ... with reduction='none'.",
        )
    if not bool(torch.isfinite(losses).all()):
        raise ResnetPathsError("loss", "NaN or infinity", "a finite loss for every example")
    # A loss that does not depend on the state at all has the gradient 0.
    slopes: list[torch.Tensor | None] = [None] * len(leaves)
    if total is not None and total.requires_grad:
        slopes = list(torch.autograd.grad(total, leaves, allow_unused=True))
    gradients = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, slopes, strict=True))
    return gradients if isinstance(state, tuple) else gradients[0]


@dataclass(frozen=True)
class Rules:
    """How cotangents are kept apart on their way back.

    Attributes:
        counted: Whether a branch makes a path longer; if not, all paths stay together.
        longest: Path length beyond which nothing is computed; None for all.
        draw_signs: Called once for each branch of each block; a number for each draw and example, [draw, batch].
    """

    counted: bool = True
    longest: int | None = None
    draw_signs: Callable[[], torch.Tensor] | None = None


@torch.no_grad()
def pull_back(
    chain: ResidualChain,
    states: Sequence[Any],
    stack: Stack,
    rules: Rules,
    *,
    down_to: int = 0,
    up_from: int | None = None,
) -> Stack:
    """A stack of cotangents pulled back through blocks.

    Args:
        chain: The chain.
        states: From `states_of`.
        stack: Cotangents at the output of block ``up_from - 1``.
        rules: What to keep apart.
        down_to: The block at whose input to stop.
        up_from: The block above which to start; None for the end of the chain.

    Returns:
        The stack at the input of block `down_to`; of no length at all if `rules.longest` allows none.
    """
    for index in reversed(range(down_to, len(chain) if up_from is None else up_from)):
        stack = _through_block(LinearBlock.at(chain[index], states[index]), stack, rules)
        if rules.longest is not None:
            stack = stack.rows(0, max(rules.longest - stack.shortest + 1, 0))
        if not len(stack):
            break
    return stack


def _through_block(block: LinearBlock, stack: Stack, rules: Rules) -> Stack:
    above = stack.pulled(block.post)
    total = None if block.skip is None else above.pulled(block.skip)
    # Only lengths that may still grow.
    to_branch = above if rules.longest is None else above.rows(0, max(rules.longest - above.shortest, 0))
    for branch in block.branches if len(to_branch) else []:
        signs = None if rules.draw_signs is None else rules.draw_signs()
        source = branch.pulled(to_branch, rules) if isinstance(branch, NestedChain) else to_branch
        if len(source):
            pullback = unchanged if isinstance(branch, NestedChain) else branch
            total = combined(total, source, pullback, signs, longer=int(rules.counted))
    if total is None:
        return above.rows(0, 0)
    passed_unscaled = not len(to_branch) or not block.branches or block.pre is not unchanged
    return total.pulled(block.pre).renormalised() if passed_unscaled else total.pulled(block.pre)


@dataclass(frozen=True)
class LinearBlock:
    """A block at a point: the transposed Jacobians of its parts; a `NestedChain` where a branch holds a chain."""

    pre: Pullback
    skip: Pullback | None
    branches: list[Pullback | NestedChain]
    post: Pullback

    @classmethod
    def at(cls, block: Block, state: Any) -> LinearBlock:
        """The block at its input `state`."""
        shared, pre = linearize(block.pre, state)
        total, skip = (None, None) if block.skip is None else linearize(block.skip, shared)
        branches: list[Pullback | NestedChain] = []
        for branch in _alternatives(block.branch):
            if isinstance(branch, ResidualChain) and len(branch):
                nested = NestedChain.at(branch, shared)
                output, pulls = nested.output, cast("Pullback | NestedChain", nested)
            else:
                output, pulls = linearize(branch, shared)
            total = output if total is None else total + output
            branches.append(pulls)
        return cls(pre, skip, branches, linearize(block.post, total)[1])


def _alternatives(branch: nn.Module | None) -> list[nn.Module]:
    """What a path may take instead of the skip; a chain among parallel branches counts as one branch."""
    if isinstance(branch, Parallel):
        return [nn.Sequential(b) if isinstance(b, ResidualChain) else b for b in branch]
    return [] if branch is None else [branch]


@dataclass(frozen=True)
class NestedChain:
    """A chain inside a branch, at a point."""

    chain: ResidualChain
    states: list[Any]
    stem: Pullback
    head: Pullback
    output: Any

    @classmethod
    def at(cls, chain: ResidualChain, state: Any) -> NestedChain:
        """The chain at its input `state`."""
        first, stem = linearize(chain.stem, state)
        states = _states_from(first, chain)
        output, head = linearize(chain.head, states[-1])
        return cls(chain, states, stem, head, output)

    def pulled(self, stack: Stack, rules: Rules) -> Stack:
        """Cotangents of its output at its input."""
        # Its own branch is one block of the path already.
        inner = rules if rules.longest is None else replace(rules, longest=rules.longest - 1)
        return pull_back(self.chain, self.states, stack.pulled(self.head), inner).pulled(self.stem)


@torch.no_grad()
def pull_paths(
    chain: ResidualChain, states: Sequence[Any], stack: Stack, paths: Sequence[Path], *, down_to: int = 0
) -> Stack:
    """Cotangents pulled back along single paths, all at once: a path of length k costs k block VJPs.

    Args:
        chain: The chain.
        states: From `states_of`, or the states inside a nested chain.
        stack: Cotangents at the last block's output, a row a path; its memory is used up.
        paths: A path a row, through the blocks from `down_to` on.
        down_to: The block at whose input to stop.

    Returns:
        The stack at the input of block `down_to`, a row a path.
    """
    for index in reversed(range(down_to, len(chain))):
        block = LinearBlock.at(chain[index], states[index])
        above = stack.pulled(block.post)
        entries = [path[index - down_to] for path in paths]
        rows_of_entry: dict[int, list[int]] = {}
        for row, entry in enumerate(entries):
            rows_of_entry.setdefault(1 if isinstance(entry, tuple) else int(entry), []).append(row)
        pieces = []
        for entry, rows in rows_of_entry.items():
            if not entry and block.skip is unchanged:
                continue  # they stay where they are
            piece = above if len(rows) == len(paths) else rows_of(above, rows)
            branch = block.branches[entry - 1] if entry else block.skip
            if isinstance(branch, NestedChain):
                inner = [cast("Path", entries[row]) for row in rows]
                inside = pull_paths(branch.chain, branch.states, piece.pulled(branch.head), inner)
                pieces.append((rows, inside.pulled(branch.stem)))
            else:
                assert branch is not None  # the paths were drawn from the block's choices
                pieces.append((rows, piece.pulled(branch).renormalised()))
        stack = _placed(above, pieces).pulled(block.pre)
    return stack


def _placed(stack: Stack, pieces: list[tuple[list[int], Stack]]) -> Stack:
    """`stack` with some rows replaced; all of them where their shape changed."""
    if sum(len(rows) for rows, _ in pieces) < len(stack):
        for rows, piece in pieces:
            index = torch.tensor(rows, device=stack.exponents.device)
            stack.exponents.index_copy_(0, index, piece.exponents)
            for whole, part in zip(parts_of(stack.values), parts_of(piece.values), strict=True):
                whole.index_copy_(0, index, part)
        return stack
    order = [row for rows, _ in pieces for row in rows]
    together = joined([piece for _, piece in pieces])
    return together if order == sorted(order) else rows_of(together, sorted(range(len(order)), key=order.__getitem__))


@torch.no_grad()
def parts_through_blocks(chain: ResidualChain, states: Sequence[Any], cotangent: Any, *, down_to: int = 0) -> Stack:
    """The whole gradient, and the part of it that passes through each block's branch.

    Args:
        chain: The chain.
        states: From `states_of`.
        cotangent: Gradient at the last block's output.
        down_to: The block at whose input to stop.

    Returns:
        A stack at the input of block `down_to`: a row for the whole gradient, then one a block, last block first.
    """
    together = Rules(counted=False)
    stack = Stack.of(cotangent)
    for index in reversed(range(down_to, len(chain))):
        block = LinearBlock.at(chain[index], states[index])
        through_branch = rows_of(stack, [0])
        if block.branches:
            through_branch = _through_block(replace(block, skip=None), through_branch, together)
        else:
            nothing = each_part(torch.zeros_like, through_branch.values)
            through_branch = _through_block(block, replace(through_branch, values=nothing).renormalised(), together)
        stack = joined([_through_block(block, stack, together), through_branch])
    return stack


@torch.no_grad()
def parameter_cotangents(block: Block, state: Any, stack: Stack) -> Stack:
    """Gradients of each example for a block's parameters, given cotangents of the block's output.

    Args:
        block: The block.
        state: Its input.
        stack: Cotangents of its output.

    Returns:
        A stack of vectors: the gradients for all parameters of the block, end to end, in the order in which
        ``block.named_parameters()`` gives them.
    """
    parameters = {name: p.detach() for name, p in block.named_parameters() if p.is_floating_point()}
    columns = []
    for example in range(stack.exponents.shape[2]):
        one = each_part(lambda t: t[example : example + 1], state)  # noqa: B023 - used at once

        def output_of(values: dict[str, torch.Tensor], one: Any = one) -> Any:
            return torch.func.functional_call(block, values, (_copy(one),))

        vjp = torch.func.vjp(output_of, parameters)[1]
        rows = each_part(lambda t: t[:, :, example : example + 1].flatten(0, 1), stack.values)  # noqa: B023
        (found,) = torch.vmap(vjp)(rows)
        columns.append(torch.cat([found[name].flatten(1) for name in parameters], 1))
    values = torch.stack(columns, 1).view(*stack.exponents.shape, -1)
    return replace(stack, values=values).renormalised()

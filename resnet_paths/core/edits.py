"""Edits of a chain. Each is a pure function that returns a new chain, which shares all weights with the old one.

There are no hooks or context managers, and nothing has to be restored. A block is given by its position (negative
counts from the end) or its name; a block of a chain inside a branch, or of a group, by its name. Where a block has
several branches, such as attention and MLP side by side, each can be deleted or scaled by the name of its module.

Positions never shift when a block is deleted: it stays in its place with its skip alone. So deletions commute, and
``delete_blocks(chain, [3, 7])`` is ``delete_block(delete_block(chain, 3), 7)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from torch import nn

from resnet_paths._utils.arguments import require_float, require_int, require_list
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import Block, ResidualChain, is_identity, require_chain
from resnet_paths.core.parts import LinearCombination, Parallel
from resnet_paths.core.paths import Entry, branch_number, check_path, choices_of

__all__ = [
    "deletable",
    "delete_block",
    "delete_blocks",
    "duplicate_block",
    "parallel_blocks",
    "path_network",
    "permute_blocks",
    "renamed",
    "reverse_blocks",
    "scale_block",
    "swap_blocks",
]


def delete_block(chain: ResidualChain, block: int | str) -> ResidualChain:
    """The network without the branch of a block. Its skip (also a projection) and what follows the addition remain.

    This is the lesion of Veit et al. 2016, section 4.1. Nothing is retrained, and BatchNorm keeps the statistics of the
    intact network. A block without skip is replaced by the identity if its input and output have the same shape.

    Args:
        chain: The chain.
        block: Position or name.

    Returns:
        A new chain of the same length that shares all weights, with half the paths if the block had one skip and one
        branch.

    Raises:
        ResnetPathsError: If there is no such block, or it has no skip and changes the shape.

    Example:
        >>> from resnet_paths import load_network, unravel
        >>> import torch
        >>> chain = unravel(load_network("preact-resnet-20"), torch.zeros(2, 1, 28, 28))
        >>> chain.num_paths, delete_block(chain, "layer1.2").num_paths
        (512, 256)
    """
    return delete_blocks(chain, [block])


def delete_blocks(chain: ResidualChain, blocks: Iterable[int | str]) -> ResidualChain:
    """The network without the branches of several blocks; see `delete_block`.

    Args:
        chain: The chain.
        blocks: Positions or names, in any order.

    Returns:
        A new chain that shares all weights; without blocks to delete, it equals the old one.

    Raises:
        ResnetPathsError: As `delete_block`.
    """
    require_chain("chain", chain)
    names = {b.name for b in chain}
    own, inside = set[int](), list[str]()
    for block in _listed(blocks):
        if isinstance(block, str) and block not in names:
            inside.append(block)
        else:
            own.add(chain.block_index(block))
    known = set(_names_in(chain)) if inside else set()
    for block in inside:
        if block not in known or _holds(chain, block):  # it may be gone with a branch that was deleted before
            chain = _with_changed(chain, block, _without_branch)
    # All at once: each new chain looks at every block.
    return chain.with_blocks(_without_branch(b) if i in own else b for i, b in enumerate(chain))


def deletable(chain: ResidualChain) -> list[int]:
    """Positions of the blocks that can be deleted: those with a skip, or whose input has the shape of their output."""
    require_chain("chain", chain)
    return [
        index
        for index, block in enumerate(chain)
        if block.skip is not None or (block.keeps_shape and block.in_shape is not None)
    ]


def permute_blocks(chain: ResidualChain, order: Sequence[int | str]) -> ResidualChain:
    """The network with its blocks in another order (Veit et al. 2016, section 4.2).

    Args:
        chain: The chain.
        order: The new order: entry i is the old position of block i; each block occurs once.

    Returns:
        A new chain that shares all weights, whose block i is the old block ``order[i]``.

    Raises:
        ResnetPathsError: If `order` is not a permutation, or shapes do not fit.
    """
    require_chain("chain", chain)
    positions = [chain.block_index(block) for block in _listed(order)]
    if sorted(positions) != list(range(len(chain))):
        raise ResnetPathsError("order", list(order), f"a permutation of the {len(chain)} blocks")
    ends = [(positions[0], 0, "in_shape"), (positions[-1], len(chain) - 1, "out_shape")] if positions else []
    for new, old, shape in ends:
        if getattr(chain[new].moved_to(chain[old]), shape) != getattr(chain[old], shape):
            raise ResnetPathsError(
                "order",
                chain[new].name,
                f"a block with {shape} {getattr(chain[old], shape)} in place of {chain[old].name!r}",
                "Only blocks of one stage that keep the shape can be swapped.",
            )
    return chain.with_blocks(chain[i].moved_to(place) for i, place in zip(positions, chain, strict=True))


def swap_blocks(chain: ResidualChain, first: int | str, second: int | str) -> ResidualChain:
    """The network with two blocks swapped.

    Args:
        chain: The chain.
        first: Position or name.
        second: Position or name. Positions refer to `chain`; two blocks of a chain inside a branch are given by name.

    Returns:
        A new chain that shares all weights.

    Raises:
        ResnetPathsError: If there is no such block, they are in different chains, or shapes do not match.
    """
    require_chain("chain", chain)
    names = {b.name for b in chain}
    inside = [block for block in (first, second) if isinstance(block, str) and block not in names]
    if inside and not (isinstance(first, str) and isinstance(second, str)):
        raise ResnetPathsError(
            "blocks",
            (first, second),
            f"two blocks of one chain; {inside[0]!r} is no block of the chain that positions refer to",
            "Give the names of both.",
        )

    def swap(chain: ResidualChain) -> ResidualChain:
        order = list(range(len(chain)))
        i, j = chain.block_index(first), chain.block_index(second)
        order[i], order[j] = order[j], order[i]
        return permute_blocks(chain, order)

    return _at_depth_of(chain, inside[0] if inside else first, swap)


def duplicate_block(chain: ResidualChain, block: int | str) -> ResidualChain:
    """The network with a block run twice in a row; the copy shares its weights and is named ``NAME#2``.

    Blocks inside its branches, and branches with names, have the same suffix in the copy.

    Args:
        chain: The chain.
        block: Position or name.

    Returns:
        A new chain with one more block, which shares all weights.

    Raises:
        ResnetPathsError: If there is no such block, or it changes the shape.
    """
    require_chain("chain", chain)
    taken = set(_names_in(chain))

    def duplicate(chain: ResidualChain) -> ResidualChain:
        index = chain.block_index(block)
        original = chain[index]
        stem = original.name.split("#")[0]
        copies = (renamed(original, f"{stem}#{k}", f"#{k}") for k in itertools.count(2))
        copy = next(copy for copy in copies if taken.isdisjoint(_names_in([copy])))
        blocks = list(chain)
        blocks.insert(index + 1, copy.moved_to(copy.replace(pre_stays=False)) if original.pre_stays else copy)
        return chain.with_blocks(blocks)

    return _at_depth_of(chain, block, duplicate)


def renamed(block: Block, name: str, suffix: str) -> Block:
    """A block under another name, for a chain that holds the block itself as well.

    Args:
        block: The block.
        name: Its name.
        suffix: What is added to the names of its branches and of all blocks inside them.

    Returns:
        A block that shares all weights.
    """
    for number, inner in _chains_in(block).items():
        inside = (renamed(b, f"{b.name}{suffix}" if b.name else "", suffix) for b in inner)
        block = block.with_branch(number, inner.with_blocks(inside))
    if isinstance(block.branch, Parallel):
        names = [f"{own}{suffix}" for own in block.branch.names]
        block = block.replace(branch=Parallel(block.branch, onto_skip=block.branch.onto_skip, names=names))
    return block.replace(name=name)


def scale_block(chain: ResidualChain, block: int | str, factor: float) -> ResidualChain:
    """The network with the branch of a block multiplied by a number: ``y = post(skip(h) + factor * branch(h))``.

    Args:
        chain: The chain.
        block: Position or name.
        factor: Any finite number; 1 changes nothing. 0 gives the outputs of a deletion if the block has a skip, but the
            paths are still counted.

    Returns:
        A new chain that shares all weights.

    Raises:
        ResnetPathsError: If there is no such block, its branch is deleted, or the factor is not finite.
    """
    factor = require_float("factor", factor)

    def scaled(original: Block) -> Block:
        branch = original.branch
        if branch is None:
            raise ResnetPathsError("block", block, "a block with a branch", "This one's branch is deleted.")
        if isinstance(branch, Parallel):
            branches = (_times(factor, one) for one in branch)
            return original.replace(branch=Parallel(branches, onto_skip=branch.onto_skip, names=branch.names))
        return original.replace(branch=_times(factor, branch))

    return _with_changed(chain, block, scaled)


def reverse_blocks(chain: ResidualChain, stage: int) -> ResidualChain:
    """The network with the blocks of a stage in reverse order; a block that changes the shape stays first.

    Args:
        chain: The chain.
        stage: Number of the stage, counted from 0.

    Returns:
        A new chain that shares all weights.

    Raises:
        ResnetPathsError: If there is no such stage.
    """
    require_chain("chain", chain)
    stages = sorted({b.stage for b in chain})
    stage = require_int("stage", stage)
    if stage not in stages:
        raise ResnetPathsError("stage", stage, f"one of {stages}")
    places = [i for i, b in enumerate(chain) if b.stage == stage and b.keeps_shape]
    order = list(range(len(chain)))
    for place, block in zip(places, reversed(places), strict=True):
        order[place] = block
    return permute_blocks(chain, order)


def parallel_blocks(
    chain: ResidualChain,
    blocks: Sequence[int | str],
    *,
    combine: Literal["mean", "sum"] = "mean",
) -> ResidualChain:
    """The network with neighbouring blocks run in parallel on one input: ``y = post(x + mean_i branch_i(x))``.

    If nothing follows the additions, the mean gives the average of the blocks' outputs, "parallel" in Sun et al.
    2024 (Layers as Painters), and the sum removes the paths through two or more of the branches and keeps all others.
    What follows the addition, `post`, is that of the last block. All paths through a chain inside a branch are kept.

    Args:
        chain: The chain.
        blocks: Positions or names of at least two consecutive blocks, all with identity skips.
        combine: ``"mean"`` or ``"sum"`` of the branches.

    Returns:
        A new chain that shares all weights, with one block in place of these; its name is theirs, joined with "|".

    Raises:
        ResnetPathsError: If the blocks are not consecutive, have other skips than the identity, or are deleted.
    """
    if combine not in ("mean", "sum"):
        raise ResnetPathsError("combine", combine, "'mean' or 'sum'")
    require_chain("chain", chain)
    places = sorted(chain.block_index(block) for block in _listed(blocks))
    if len(places) < 2 or places != list(range(places[0], places[-1] + 1)):
        raise ResnetPathsError("blocks", list(blocks), "at least two blocks that stand side by side")
    members = [chain[i] for i in places]
    for member in members:
        if not (is_identity(member.skip) and is_identity(member.pre) and member.branch is not None):
            raise ResnetPathsError("blocks", member.name, "blocks with a branch and an identity skip")
    branches = [branch for member in members for branch in member.branches]
    names = [name for member in members for name in (member.branch_names or (member.name,) * len(member.branches))]
    names = names if len(set(names)) == len(names) else []
    if combine == "mean":
        branches = [_times(1 / len(members), branch) for branch in branches]
    joined = members[-1].replace(branch=Parallel(branches, names=names), name="|".join(m.name for m in members))
    rest = list(chain)
    rest[places[0] : places[-1] + 1] = [joined]
    return chain.with_blocks(rest)


def path_network(chain: ResidualChain, path: Sequence[Entry]) -> ResidualChain:
    """The network of a single path: each block is reduced to its skip or to its branch.

    The outputs of these networks do not sum to the output of the chain, since branches are not linear. Dong et al.
    (2021, section 2.2) run such a network for each path of a transformer.

    Args:
        chain: The chain.
        path: One entry per block: False = skip, True = branch, or a path if the branch is a chain.

    Returns:
        A new chain of one path that shares all weights.

    Raises:
        ResnetPathsError: If the path does not fit the chain.
    """
    require_chain("chain", chain)
    path = check_path(choices_of(chain), path)
    return chain.with_blocks(_take(block, entry) for block, entry in zip(chain, path, strict=True))


def _take(block: Block, entry: Entry) -> Block:
    if not isinstance(entry, tuple) and not entry:
        return block.replace(branch=None)
    if isinstance(entry, tuple):
        branch: nn.Module = path_network(block.nested[branch_number(entry)], entry)
    else:
        branch = block.branches[entry - 1]
    return block.replace(branch=branch, skip=None, skip_kind=None)


def _times(factor: float, branch: nn.Module) -> nn.Module:
    """A branch times a number; of a chain, whose paths still count, the head is."""
    if isinstance(branch, ResidualChain):
        return branch.with_head(LinearCombination([branch.head], [factor]))
    return LinearCombination([branch], [factor])


def _with_changed(chain: ResidualChain, block: int | str, change: Callable[[Block], Block]) -> ResidualChain:
    """The chain with one block, or one of several branches of a block, changed, at whatever depth it stands."""

    def edit(chain: ResidualChain) -> ResidualChain:
        if isinstance(block, str) and block not in (b.name for b in chain):
            of_branch = [i for i, b in enumerate(chain) if block in b.branch_names]
            if of_branch:
                changed = _with_branch_changed(chain[of_branch[0]], block, change)
                return chain.with_blocks(changed if i == of_branch[0] else b for i, b in enumerate(chain))
        index = chain.block_index(block)
        return chain.with_blocks(change(b) if i == index else b for i, b in enumerate(chain))

    return _at_depth_of(chain, block, edit)


def _with_branch_changed(block: Block, name: str, change: Callable[[Block], Block]) -> Block:
    """A block of several branches with one of them changed as if it were the only one."""
    if len(block.branches) == 1:
        return change(block)
    number = block.branch_names.index(name)
    # The others lead from input to output as a skip does.
    alone = block.replace(branch=block.branches[number], skip=block.skip or nn.Identity(), name=name)
    changed = change(alone).branch
    if changed is not None:
        return block.with_branch(number + 1, changed)
    branches, names = list(block.branches), list(block.branch_names)
    del branches[number], names[number]
    onto_skip = isinstance(block.branch, Parallel) and block.branch.onto_skip
    return block.replace(branch=Parallel(branches, onto_skip=onto_skip, names=names))


def _at_depth_of(
    chain: ResidualChain, block: int | str, edit: Callable[[ResidualChain], ResidualChain]
) -> ResidualChain:
    """The chain with an edit made to the chain that holds a block: itself, or one inside a branch or a group."""
    require_chain("chain", chain)
    if isinstance(block, str) and block not in (b.name for b in chain):
        for index, outer in enumerate(chain):
            for number, inner in _chains_in(outer).items():
                if _holds(inner, block):
                    inside = outer.with_branch(number, _at_depth_of(inner, block, edit))
                    return chain.with_blocks(inside if i == index else b for i, b in enumerate(chain))
    return edit(chain)


def _chains_in(block: Block) -> dict[int, ResidualChain]:
    """The chains inside a block's branches, by the number of the branch; of a group, the run of its blocks."""
    return block.nested if block.run is None else {1: block.run}


def _holds(chain: ResidualChain, name: str) -> bool:
    return any(name == own for own in _names_in(chain))


def _names_in(blocks: Iterable[Block]) -> Iterator[str]:
    """The names of blocks, of their branches, and of all blocks inside these."""
    for block in blocks:
        yield from filter(None, (block.name, *block.branch_names))
        for inner in _chains_in(block).values():
            yield from _names_in(inner)


def _listed(blocks: Iterable[int | str]) -> list[int | str]:
    return require_list("blocks", blocks, "a list of positions or names", f"Write [{blocks!r}].")


def _without_branch(block: Block) -> Block:
    if block.skip is not None:
        return block.replace(branch=None)
    if not block.keeps_shape or block.in_shape is None:
        raise ResnetPathsError(
            "block",
            block.name,
            "a block with a skip, or one that keeps the shape",
            f"Without its branch nothing would lead from {block.in_shape} to {block.out_shape}.",
        )
    return block.replace(branch=None, skip=nn.Identity().train(block.training), skip_kind="identity")

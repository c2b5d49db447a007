"""Groups of blocks, such as transformer layers or stages, as the blocks of a chain.

A group is one block: its branch is what the run of its blocks adds to their input, ``run(x) - x``, and its skip leads
around all of them. It returns ``run(x)`` bit for bit, and deleted it returns x. So every edit, plan, score and gradient
works on layers.

A group offers two paths, around the run and through it. With identity skips and nothing after the additions a run of
blocks with p paths has one that takes no branch, which is the path around, so that the group's branch stands for the
other p - 1: 3 for attention and MLP one after the other. A path that takes m groups stands for the product of these
numbers, and the gradient along it is the sum over all these paths.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn

from resnet_paths._utils.arguments import require_list
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import Block, ResidualChain, is_identity, require_chain
from resnet_paths.core.parts import LinearCombination
from resnet_paths.core.units import layer_of

__all__ = ["group_blocks", "runs_of", "ungrouped"]

Module = TypeVar("Module", bound=nn.Module)

_UNITS = ("transformer_layer", "stage")


def group_blocks(
    chain: ResidualChain, unit: str | Iterable[Sequence[int | str]] = "transformer_layer"
) -> ResidualChain:
    """The chain with runs of consecutive blocks grouped into one block each, with a skip around each run.

    Outputs are the same, bit for bit, and all weights are shared. A block inside a group is still found by its name. A
    run that already is an identity skip and a branch stays as it is.

    Args:
        chain: The chain.
        unit: What to group: ``"transformer_layer"``, attention and MLP together, as for `resnet_paths.path_histogram`;
            ``"stage"``; or a list of runs, each the positions or names of consecutive blocks. Blocks outside the runs
            stay as they are.

    Returns:
        A new chain with a block for each run, named after the module that contains its blocks, or after its first and
        last block. If such a block is deleted, the input of the run remains if the run keeps the shape, else what
        remains when each of its blocks is deleted. A run with a block that has no skip becomes a block without skip,
        whose branch is the chain of its blocks.

    Raises:
        ResnetPathsError: If the unit is unknown, blocks of a run are not consecutive, or runs overlap.

    Example:
        >>> from resnet_paths import load_network, unravel
        >>> import torch
        >>> chain = unravel(load_network("vit-small"), torch.zeros(2, 1, 28, 28))
        >>> layers = group_blocks(chain, "transformer_layer")
        >>> len(chain), len(layers), layers.num_paths == 2**12
        (24, 12, True)
    """
    require_chain("chain", chain)
    runs = runs_of(chain, unit)
    names = _names_of_runs(chain, runs)
    old, blocks = list(chain), []
    start = 0
    for run, name in zip(runs, names, strict=True):
        blocks += old[start : run[0]]
        blocks.append(_group(chain, [old[i] for i in run], name))
        start = run[-1] + 1
    return chain.with_blocks([*blocks, *old[start:]])


def ungrouped(chain: ResidualChain) -> ResidualChain:
    """The chain with the blocks of each intact group in its place, which computes the same thing.

    Args:
        chain: The chain.

    Returns:
        The chain itself where it has no group. Blocks that occur several times have no name.
    """
    if all(block.run is None for block in chain):
        return chain
    blocks: list[Block] = []
    for block in chain:
        run = block.run
        if run is None or not is_identity(block.post) or not (is_identity(block.pre) or block.pre_stays):
            blocks.append(block)
            continue
        first, *others = ungrouped(run)
        if block.pre_stays:
            first = first.replace(pre=block.pre, pre_stays=True, in_shape=block.in_shape)
        blocks += [first, *others]
    times = Counter(block.name for block in blocks)
    return chain.with_blocks(b if times[b.name] == 1 else b.replace(name="") for b in blocks)


def runs_of(chain: ResidualChain, unit: str | Iterable[Sequence[int | str]]) -> list[tuple[int, ...]]:
    """The runs of blocks that a unit stands for.

    Args:
        chain: The chain.
        unit: As for `group_blocks`.

    Returns:
        Positions of the blocks of each run, first to last.

    Raises:
        ResnetPathsError: As `group_blocks`.
    """
    allowed = f"{' or '.join(map(repr, _UNITS))}, or a list of runs of blocks"
    if isinstance(unit, str):
        if unit not in _UNITS:
            raise ResnetPathsError("unit", unit, allowed)
        keys = [block.stage if unit == "stage" else layer_of(block) for block in chain]
        return [tuple(run) for _, run in itertools.groupby(range(len(chain)), key=lambda index: keys[index])]
    listed = [require_list("unit", run, allowed) for run in require_list("unit", unit, allowed)]
    runs = sorted(tuple(sorted(chain.block_index(block) for block in run)) for run in listed)
    for run in runs:
        if not run or run != tuple(range(run[0], run[-1] + 1)):
            raise ResnetPathsError("unit", [chain[i].name for i in run], "runs of blocks that stand side by side")
    for run, later in itertools.pairwise(runs):
        if later[0] <= run[-1]:
            raise ResnetPathsError("unit", chain[later[0]].name, "runs without a block in common")
    return runs


def _group(chain: ResidualChain, members: list[Block], name: str) -> Block:
    """One block for several; what stands before the first stays there, as of a block."""
    first, last = members[0], members[-1]
    if len(members) == 1 and is_identity(first.skip) and is_identity(first.post):
        return first if first.name == name else first.replace(name=name)
    place = first
    if first.pre_stays:
        first = first.moved_to(first.replace(pre=None, pre_stays=False))
    members = [first, *members[1:]]
    run = _chain_of(chain, members)
    skip: nn.Module | None = None
    branch: nn.Module | None = run
    if all(member.skip is not None for member in members):
        skip = _around(chain, members)
        has_branch = any(member.branch is not None for member in members)
        branch = LinearCombination([run, skip], [1.0, -1.0]) if has_branch else None
    concatenates = all(member.skip_kind in ("concat", "identity") for member in members)
    group = Block(
        branch,
        skip,
        pre=place.pre if place.pre_stays else None,
        pre_stays=place.pre_stays,
        name=name,
        skip_kind="concat" if skip is not None and not is_identity(skip) and concatenates else None,
        stage=place.stage,
        in_shape=place.in_shape,
        out_shape=last.out_shape,
    )
    return _in_mode_of(chain, group)


def _around(chain: ResidualChain, members: list[Block]) -> nn.Module:
    """What leads around a run: the identity where that fits, else its blocks without their branches."""
    shapes = members[0].in_shape, members[-1].out_shape
    does_nothing = all(is_identity(part) for m in members for part in (m.pre, m.skip, m.post))
    if does_nothing or (None not in shapes and shapes[0] == shapes[1]):
        return nn.Identity().train(chain.training)
    return _chain_of(chain, [member.replace(branch=None) for member in members])


def _chain_of(chain: ResidualChain, members: list[Block]) -> ResidualChain:
    """Some blocks of a chain as a chain of their own, from state to state."""
    ends = (nn.Identity().train(chain.training) for _ in range(2))
    made = _in_mode_of(chain, ResidualChain(next(ends), members, next(ends)))
    made.blocks.training, made.eval_only = chain.training, chain.eval_only
    return made


def _in_mode_of(chain: ResidualChain, module: Module) -> Module:
    module.training = chain.training  # not module.train(): the parts are shared
    for part in module.children():
        if is_identity(part):
            part.training = chain.training
    return module


def _names_of_runs(chain: ResidualChain, runs: Sequence[Sequence[int]]) -> list[str]:
    """The name of the module that holds a run and nothing else; those of its first and last block where none does."""
    paths_of_blocks = [block.name.split(".") for block in chain]
    num_blocks_in = Counter(".".join(path[:end]) for path in paths_of_blocks for end in range(1, len(path) + 1))
    names: list[str] = []
    for run in runs:
        inside = [chain[i].name for i in run]
        paths = [paths_of_blocks[i] for i in run]
        common = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False))]
        name = ".".join(common)
        taken = not name or num_blocks_in[name] > len(run)
        names.append(f"{inside[0]}:{inside[-1]}" if taken and len(run) > 1 else name or inside[0])
    return names

"""The blocks of a network with skips, read off its trunk.

Chains inside branches are found in the same way between fork and branch; where blocks in a row read
what none of them changes, it is carried along.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch.fx import Node

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.weight_layers import is_weighted, makes_branch
from resnet_paths.unraveling.concatenations import dimension
from resnet_paths.unraveling.gathers import gathering_parts
from resnet_paths.unraveling.lanes import find_lane, same_batch
from resnet_paths.unraveling.merges import Core, core_of, is_merge, owner_of, refuse_other_merge, trunk_between
from resnet_paths.unraveling.packing import Packed
from resnet_paths.unraveling.parts import Options, Part
from resnet_paths.unraveling.sizes import same_shape
from resnet_paths.unraveling.tracing import Trace, is_within, module_path

__all__ = ["residual_parts"]

_CAT = torch.ops.aten.cat.default
_MULTIPLES = {torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor, torch.ops.aten.neg.default}


def residual_parts(traced: Trace, options: Options) -> list[Part]:
    """The residual blocks of a network.

    Args:
        traced: The network's graph.
        options: What the caller says of the structure.

    Returns:
        The blocks in order; none for a plain net.

    Raises:
        ResnetPathsError: If the network is not a chain; the node that breaks it is named.
    """
    return _parts(traced, trunk_between(traced, None, traced.output), options)


def _parts(traced: Trace, trunk: list[Node], options: Options, *, strict: bool = True) -> list[Part]:
    """The blocks of a network with skips; empty if there is no merge on the trunk."""
    # Inside a branch nothing is refused, `strict` is False: what is no merge there is a part of the branch.
    cores: list[Core] = []
    extended = trunk[:1]
    for fork, node in itertools.pairwise(trunk):
        between = partial(_blocks_between, traced, options=options)
        gathering = gathering_parts(traced, fork, node, between)
        if gathering:
            cores.append(Core(fork, node, None, (), gathering=gathering))
        elif is_merge(traced, fork, node, parts_too=strict):
            try:
                cores.append(core_of(traced, fork, node, options.skips))
            except ResnetPathsError:
                found = find_lane(traced, fork, node)
                if strict and not found:
                    raise
                cores += found
                extended += found[0].lane.trunk[:-1] if found and found[0].lane else ()
        elif strict:
            refuse_other_merge(traced, fork, node)
        extended.append(node)
    if not strict:
        # Instruments take the batch from dimension 0, inside branches too.
        cores = [core for core in cores if same_batch(core.merge, trunk[0]) and same_batch(core.fork, trunk[0])]
    if not cores:
        return []
    line = _Line(traced, extended, cores)
    ends = [line.end_of_post(index) for index in range(len(cores))]
    starts = [line.start_of_first(), *ends[:-1]]
    lanes = [None, *(core.lane for core in cores), None]
    parts: list[Part] = []
    for index, (start, core, end) in enumerate(zip(starts, cores, ends, strict=True)):
        if core.gathering:
            parts += [core.gathering[0].starting_at(start), *core.gathering[1:]]
        elif core.ladder:
            parts += _ladder_parts(core, start, end)
        elif core.lane is not None:
            parts.append(
                _lane_part(
                    core, start, end, enters=lanes[index] is not core.lane, leaves=lanes[index + 2] is not core.lane
                )
            )
        else:
            parts.append(_part(traced, core, start, end, options))
        if index and cores[index - 1].gathering:
            # What is gathered is put together between two blocks, whether or not one of them is deleted.
            first = len(parts) - (len(core.gathering) or len(core.ladder) or 1)
            parts[first] = replace(parts[first].starting_at(parts[first - 1].end), pre_stays=True)
    return parts


def _blocks_between(traced: Trace, source: Node, target: Node, *, options: Options) -> list[Part]:
    return _parts(traced, trunk_between(traced, source, target), options, strict=False)


def _part(traced: Trace, core: Core, start: Node, end: Node, options: Options) -> Part:
    inner = tuple(_inside(traced, core.fork, branch, options) for branch in core.branches)
    skip: Node | Packed | None = core.skip
    branches: tuple[Node | Packed, ...] = core.branches
    module = owner_of(traced, core)
    joins = core.merge.target is _CAT
    if joins:
        # Concatenation is addition in a wider space. It is in the layer that reads it, not in the block's module.
        module = ""
        operands = tuple(core.merge.args[0])  # type: ignore[arg-type]
        layout = Packed(operands, operands, dimension(core.merge))

        def alone(operand: Node) -> Packed:
            return layout.holding(*(node if node is operand else None for node in operands))

        skip = None if core.skip is None else alone(core.skip)
        branches = tuple(map(alone, core.branches))
    stays = _stands_between(traced, module, start, core.fork)
    is_mixture = False
    if core.skip is not None and core.skip is not core.fork and not joins:
        is_mixture = all(node.target in _MULTIPLES for node in traced.region([core.fork], core.skip))
    return Part(
        module,
        start,
        core.fork,
        core.merge,
        end,
        skip,
        branches,
        inner,
        core.onto_skip,
        joins,
        core.guess,
        stays,
        is_mixture,
    )


def _stands_between(traced: Trace, module: str, start: Node, fork: Node) -> bool:
    """Whether what leads from a block to the fork of the next belongs to neither, as a layer between two stages."""
    nodes = traced.region([start], fork)
    if module:
        return bool(nodes) and not any(is_within(module_path(node), module) for node in nodes)
    return any(map(makes_branch, nodes))


def _lane_part(core: Core, start: Node, end: Node, *, enters: bool, leaves: bool) -> Part:
    """A block whose state also holds what the blocks of its lane read; their branches are taken whole."""
    lane = core.lane
    assert lane is not None  # held by the caller
    fork, merge = lane.state(core.fork), lane.state(core.merge)
    branches = tuple(map(lane.added, core.branches))
    return Part(
        module_path(core.merge),
        start if enters else lane.state(start),
        fork,
        merge,
        end if leaves else lane.state(end),
        fork,
        branches,
        ((),) * len(branches),
        core.onto_skip,
    )


def _ladder_parts(core: Core, start: Node, end: Node) -> list[Part]:
    """The blocks of a ladder, whose state holds x and the sum so far, under the name of the whole sum."""
    total, layout = core.merge, core.layout
    assert layout is not None  # a ladder has one
    state: Node | Packed = layout.holding(core.ladder[0].fork, None)
    before: Node | Packed = start
    parts = []
    for step, later in itertools.zip_longest(core.ladder, core.ladder[1:]):
        fork = state
        merge = layout.holding(step.merge or step.fork, total)
        state = end if later is None else layout.holding(later.fork, total)
        branch = layout.holding(step.branch, step.side)
        parts.append(Part(module_path(step.merge or step.side), before, fork, merge, state, fork, (branch,)))
        before = state
    return parts


def _inside(traced: Trace, fork: Node, branch: Node, options: Options) -> tuple[Part, ...]:
    """The blocks of the chain inside a branch."""
    if branch is fork or options.max_depth == 0:
        return ()
    return tuple(_blocks_between(traced, fork, branch, options=options.inside))


class _Line:
    """A trunk with its merges: where on it each block begins and ends."""

    def __init__(self, traced: Trace, trunk: list[Node], cores: Sequence[Core]) -> None:
        self.trunk = trunk
        self.position = {node: i for i, node in enumerate(trunk)}
        # A block before a lane ends where the lane is entered, at the latest.
        before = [None, *(core.lane for core in cores)]
        self.forks = [
            core.lane.entry if core.lane and core.lane is not last else core.fork
            for core, last in zip(cores, before, strict=False)
        ]
        self.merges = [core.merge for core in cores]
        self.modules = [owner_of(traced, core) for core in cores]
        self._merges_of = Counter(self.modules)

    def end_of_post(self, index: int) -> Node:
        """The last trunk node that belongs to block `index`: the merge itself, or what follows it in its module."""
        merge, own = self.merges[index], self.modules[index]
        last = index == len(self.merges) - 1
        limit = len(self.trunk) - 1 if last else self.position[self.forks[index + 1]]
        following = None if last else self.modules[index + 1]
        end = merge
        for node in self.trunk[self.position[merge] + 1 : limit + 1]:
            path = module_path(node)
            if not is_within(path, own):
                break
            if following is not None and following != own and is_within(following, own) and is_within(path, following):
                break  # the next block stands inside this one's module and owns the node
            if self._makes_several(own):
                # The module does not tell: an activation or a normalisation that keeps the shape belongs to the merge
                # before it, but at the end of the chain only if one like it follows the merge before.
                if is_weighted(node) or not same_shape(node, merge):
                    break
                if last and not self._follows_the_merge_before(node):
                    break
            end = node
        # A merge of vectors from all places of all examples: the block ends where examples are apart again.
        later = self.trunk[self.position[end] : limit + 1]
        return next((node for node in later if same_batch(node, self.trunk[0])), end)

    def start_of_first(self) -> Node:
        """Where the first block begins: at the trunk nodes before its fork that are in its module."""
        own = self.modules[0]
        start = self.position[self.forks[0]]
        if not self._makes_several(own):
            while start > 0 and is_within(module_path(self.trunk[start]), own):
                start -= 1
        return self.trunk[start]

    def _makes_several(self, path: str) -> bool:
        """Whether a module's own forward makes several merges, or is the model's."""
        return path == "" or self._merges_of[path] > 1

    def _follows_the_merge_before(self, node: Node) -> bool:
        """Whether the node after the last merge has its like after the merge before: then it is no part of the head."""
        if len(self.merges) < 2:
            return module_path(node) == ""
        twin = self.position[self.merges[-2]] + self.position[node] - self.position[self.merges[-1]]
        return twin < self.position[self.merges[-1]] and self.trunk[twin].target == node.target

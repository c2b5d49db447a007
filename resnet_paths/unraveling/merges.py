"""Where a flat graph forks and merges: the blocks of a network, read off its trunk.

- The *trunk* is the nodes that every route from input to output passes (the dominators of the output).
- A *merge* is an addition on the trunk of values that depend on the input, or a concatenation of branches.
- Its *fork* is its immediate dominator: the point where skip and branches part.

Additions inside a branch, in a squeeze-and-excitation gate or in a polynomial activation are not on the trunk and fall
away by themselves. What stands between fork and branch is looked at in the same way, for chains inside branches.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch.fx import Node

from resnet_paths.errors import ResnetPathsError
from resnet_paths.tracing import Trace, describe, module_path, module_stack
from resnet_paths.unraveling.carrying import read_beside
from resnet_paths.unraveling.concatenations import are_apart, concatenated, is_in_groups, is_weighted

__all__ = ["Part", "common_module", "plain_parts", "residual_parts"]

_ADD = torch.ops.aten.add.Tensor
_CAT = torch.ops.aten.cat.default
_PRODUCTS = {
    torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor, torch.ops.aten.matmul.default, torch.ops.aten.bmm.default,
    torch.ops.aten.mm.default, torch.ops.aten.einsum.default, torch.ops.aten.scaled_dot_product_attention.default,
}  # fmt: skip
_CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}


@dataclass(frozen=True)
class Part:
    """A block on the graph: ``start -pre-> fork -(skip, branches)-> merge -post-> end``.

    Attributes:
        module: The module whose forward merges.
        start: Where the block before ends.
        fork: Where skip and branches part.
        merge: Where they are added, or concatenated.
        end: The last node that belongs to the block.
        skip: Operand of the merge; None where there is no skip.
        branches: The other operands; several are alternatives that a path may take.
        inner: For each branch the blocks inside it; none where it holds no chain.
        onto_skip: Whether the branches are added to the skip one after the other, not their sum at once.
        rungs: Where the part is a ladder, whose state is a pair, its blocks; it has no branches of its own then.
        lane: The run of blocks it belongs to, where these carry something along; None elsewhere.
    """

    module: str
    start: Node
    fork: Node
    merge: Node
    end: Node
    skip: Node | None
    branches: tuple[Node, ...]
    inner: tuple[tuple[Part, ...], ...] = ((),)
    onto_skip: bool = False
    rungs: tuple[Rung, ...] = ()
    lane: Lane | None = None


@dataclass(frozen=True)
class Lane:
    """Some blocks in a row that also read what none of them changes, such as the tokens that a class token attends to.

    Attributes:
        traced: The graph in which only what is made from their first value counts as dependent.
        entry: The last value before them.
        trunk: From their first value to the last merge.
        carried: What they read beside it, made from the entry.
    """

    traced: Trace
    entry: Node
    trunk: tuple[Node, ...]
    carried: tuple[Node, ...]


@dataclass(frozen=True)
class Rung:
    """A block on the pair of a value x and a sum s, as in WaveNet: x + branch(x) and s + side(x).

    Attributes:
        fork: x.
        merge: Where the branch is added to x; None for the last block, which adds to the sum alone.
        branch: What is added to x; None for the last block.
        side: What is added to the sum.
    """

    fork: Node
    merge: Node | None
    branch: Node | None
    side: Node


def residual_parts(traced: Trace, max_depth: int | None) -> list[Part]:
    """The residual blocks of a network.

    Args:
        traced: The network's graph.
        max_depth: How many chains may stand inside one another; None for any number.

    Returns:
        The blocks in order; none for a plain net.

    Raises:
        ResnetPathsError: If the network is not a chain; the node that breaks it is named.
    """
    return _residual_parts(traced, _trunk(traced, None, traced.output), max_depth)


def plain_parts(traced: Trace) -> list[Part]:
    """The modules of a network without skips, as blocks without skip.

    Args:
        traced: The network's graph.

    Returns:
        The blocks in order, at least one.

    Raises:
        ResnetPathsError: If the network is not a chain; the node that breaks it is named.
    """
    return _plain_parts(traced, _trunk(traced, None, traced.output))


def _trunk(traced: Trace, source: Node | None, target: Node) -> list[Node]:
    """The nodes that every route from a source passes, in order: from the source, or the first after the inputs."""
    root: Any = "inputs" if source is None else source
    graph = nx.DiGraph()
    graph.add_node(root)
    for node in traced.in_order(traced.region([] if source is None else [source], target)):
        before: list[Any] = [*traced.dependent_inputs(node)] or ["inputs"]
        graph.add_edges_from((operand, node) for operand in before)
    dominators = nx.immediate_dominators(graph, root)
    trunk = [target]
    while trunk[-1] is not root and dominators[trunk[-1]] != "inputs":
        trunk.append(dominators[trunk[-1]])
    # Pieces, such as the halves of a state, stand between two tensors; no block begins or ends there.
    return [node for node in trunk[::-1] if isinstance(node.meta.get("val"), torch.Tensor)]


@dataclass(frozen=True)
class _Core:
    """A merge and what it adds up, before it is known where the block begins and ends."""

    fork: Node
    merge: Node
    skip: Node | None
    branches: tuple[Node, ...]
    onto_skip: bool = False
    rungs: tuple[Rung, ...] = ()
    lane: Lane | None = None


def _residual_parts(traced: Trace, trunk: list[Node], depth: int | None, *, strict: bool = True) -> list[Part]:
    """The blocks of a network with skips; empty if there is no merge on the trunk."""
    # Inside a branch nothing is refused, `strict` is False: what is no merge there is a part of the branch.
    cores: list[_Core] = []
    extended = trunk[:1]
    for fork, node in itertools.pairwise(trunk):
        if _joins(traced, fork, node, parts_too=strict) and _holds_weights(traced, fork, node):
            try:
                cores.append(_core(traced, fork, node))
            except ResnetPathsError:
                found = _lane(traced, fork, node)
                if strict and not found:
                    raise
                cores += found
                extended += found[0].lane.trunk[:-1] if found and found[0].lane else ()
        elif strict:
            _refuse_other_merge(traced, fork, node)
        extended.append(node)
    if not strict:
        # Instruments take the batch from dimension 0, inside branches too.
        cores = [core for core in cores if _same_batch(core.merge, trunk[0]) and _same_batch(core.fork, trunk[0])]
    if not cores:
        return []
    line = _Line(extended, cores)
    ends = [line.end_of_post(index) for index in range(len(cores))]
    starts = [line.start_of_first(), *ends[:-1]]
    return [
        Part(
            module_path(core.merge), start, core.fork, core.merge, end, core.skip, core.branches,
            tuple(
                _inside(core.lane.traced if core.lane else traced, core.fork, branch, depth) for branch in core.branches
            ),
            core.onto_skip, core.rungs, core.lane,
        )
        for start, core, end in zip(starts, cores, ends, strict=True)
    ]  # fmt: skip


def _lane(traced: Trace, entry: Node, merge: Node) -> list[_Core]:
    """The blocks that lead to a merge if what else they read is carried along; none if they are no such run."""
    if traced.given or any(node.op != "placeholder" for node in traced.inputs):
        return []  # in another lane
    best: list[_Core] = []
    inside = traced.region([entry], merge)
    # The first value may be a parameter, such as a class token.
    firsts = traced.in_order(inside | {arg for node in inside for arg in node.all_input_nodes} - {entry, merge})
    for first in firsts:
        if len(first.users) < 2 or not _is_batch(first, entry):
            continue
        reduced = Trace(traced.graph, [first], traced.output, traced.tensors)
        if not reduced.depends_on_input(merge):
            continue
        trunk = _trunk(reduced, first, merge)
        try:
            cores = _cores(reduced, trunk)
        except ResnetPathsError:
            continue
        if any(core.skip is not core.fork for core in cores):
            continue  # streams that meet again and again (HRNet) are no run of residual blocks
        # One block alone is none of several that read the same.
        carried = read_beside(traced, reduced, first, merge) if len(cores) > max(len(best), 1) else None
        if carried and cores[-1].merge is merge and all(node is entry or node in inside for node in carried):
            lane = Lane(reduced, entry, tuple(trunk), tuple(carried))
            best = [replace(core, lane=lane) for core in cores]
    return best


def _cores(traced: Trace, trunk: list[Node]) -> list[_Core]:
    pairs = itertools.pairwise(trunk)
    return [
        _core(traced, *pair)
        for pair in pairs
        if _joins(traced, *pair, parts_too=False) and _holds_weights(traced, *pair)
    ]


def _is_batch(node: Node, other: Node) -> bool:
    return all(isinstance(n.meta.get("val"), torch.Tensor) for n in (node, other)) and _same_batch(node, other)


def _inside(traced: Trace, fork: Node, branch: Node, depth: int | None) -> tuple[Part, ...]:
    """The blocks of the chain inside a branch."""
    if branch is fork or (depth is not None and depth < 1):
        return ()
    below = None if depth is None else depth - 1
    return tuple(_residual_parts(traced, _trunk(traced, fork, branch), below, strict=False))


def _same_batch(one: Node, other: Node) -> bool:
    sizes = [node.meta["val"].shape[:1] for node in (one, other)]
    return len(sizes[0]) == len(sizes[1]) == 1 and str(sizes[0][0]) == str(sizes[1][0])


def _joins(traced: Trace, fork: Node, node: Node, *, parts_too: bool) -> bool:
    """Whether a node adds two values that depend on the input, or concatenates branches."""
    if node.target is _CAT:
        return concatenated(traced, fork, node, parts_too=parts_too) is not None
    return node.target is _ADD and len(traced.dependent_inputs(node)) == 2


def _core(traced: Trace, fork: Node, merge: Node) -> _Core:
    """Which operands of a merge are the skip and the branches."""
    if merge.target is _CAT:
        found = concatenated(traced, fork, merge, parts_too=True)
        assert found is not None  # held by _joins
        return _Core(fork, merge, *found)
    if merge.kwargs.get("alpha", 1) != 1:
        raise _not_a_chain(merge, "an addition with alpha=1")
    operands = traced.dependent_inputs(merge)
    summands = _summands(traced, fork, merge)
    if len(summands) > 2 and _are_alternatives(traced, fork, summands):
        skip = _skip_among(traced, fork, summands)
        branches = tuple(s for s in summands if s is not skip)
        return _Core(fork, merge, skip, branches, onto_skip=skip is not None and skip not in operands)
    shared = traced.region([fork], operands[0]) & traced.region([fork], operands[1])
    rungs = _rungs(traced, fork, summands) if shared else ()
    if rungs:
        return _Core(fork, merge, None, (), rungs=rungs)
    if shared:
        node = traced.in_order(shared)[0]
        raise _not_a_chain(
            node, f"a skip and a branch that share nothing between fork {fork.name} and merge {merge.name}"
        )
    skip = _skip_among(traced, fork, operands)
    return _Core(fork, merge, skip, tuple(o for o in operands if o is not skip))


def _summands(traced: Trace, fork: Node, merge: Node) -> list[Node]:
    """What a merge adds up, sums of sums written out, from left to right."""
    found: list[Node] = []
    for operand in traced.dependent_inputs(merge):
        inner = operand is not fork and operand.target is _ADD and operand.kwargs.get("alpha", 1) == 1
        if inner and len(operand.users) == 1 and len(traced.dependent_inputs(operand)) == len(operand.all_input_nodes):
            found += _summands(traced, fork, operand)
        else:
            found.append(operand)
    return found


def _are_alternatives(traced: Trace, fork: Node, summands: Sequence[Node]) -> bool:
    """Whether values go from the fork to the merge side by side: no two share a weight layer, at most one has none."""
    # A normalisation that they share, as parallel attention and MLP do, is computed by each of them.
    weighted = [{n for n in traced.region([fork], s) if is_weighted(n)} for s in summands]
    apart = are_apart(weighted)
    return len(set(summands)) == len(summands) and apart and sum(not layers for layers in weighted) <= 1


def _rungs(traced: Trace, fork: Node, summands: Sequence[Node]) -> tuple[Rung, ...]:
    """The blocks of a ladder: each summand is made from one of the values x along a line of residual additions."""
    rails = {summand: _trunk(traced, fork, summand) for summand in summands}
    rail = max(rails.values(), key=len)
    steps = [
        (x, merge)
        for x, merge in itertools.pairwise(rail)
        if merge.target is _ADD
        and x in (operands := traced.dependent_inputs(merge))
        and len(operands) == 2
        and _holds_weights(traced, x, merge)
    ]
    if not steps or len(summands) != len(steps) + 1:
        return ()
    values = [*(x for x, _ in steps), steps[-1][1]]
    made_from = {max((i for i, x in enumerate(values) if x in trunk), default=0): s for s, trunk in rails.items()}
    if sorted(made_from) != list(range(len(values))):
        return ()
    branches = [next(o for o in traced.dependent_inputs(merge) if o is not x) for x, merge in steps]
    rungs = [Rung(x, merge, b, made_from[i]) for i, ((x, merge), b) in enumerate(zip(steps, branches, strict=True))]
    rungs.append(Rung(values[-1], None, None, made_from[len(steps)]))
    read = [(rung.fork, made) for rung in rungs for made in (rung.branch, rung.side) if made is not None]
    if any(fork in traced.region([x], made) for x, made in read if x is not fork and made is not x):
        return ()  # a block reads the fork beside its own value
    return tuple(rungs)


def _skip_among(traced: Trace, fork: Node, operands: Sequence[Node]) -> Node | None:
    """The fork itself, else the one operand of the fewest weight layers; None if no single one has the fewest."""
    if fork in operands:
        return fork
    costs = [sum(map(is_weighted, traced.region([fork], operand))) for operand in operands]
    return operands[costs.index(min(costs))] if costs.count(min(costs)) == 1 else None


def _holds_weights(traced: Trace, fork: Node, merge: Node) -> bool:
    """Whether anything with parameters stands between fork and merge: x + sin(x) is an activation, not a block."""
    inside = {a for n in traced.region([fork], merge) for a in n.all_input_nodes if not traced.depends_on_input(a)}
    # A weight may be standardised or cut before it is used.
    return fork.meta["val"].is_floating_point() and traced.reads_tensors(inside)


def _refuse_other_merge(traced: Trace, fork: Node, node: Node) -> None:
    """Refuse what joins computed branches in another way than by adding, such as a concatenation or a difference."""
    # Gates and attention (products) stand inside a segment; a concatenation of slices (patch merging) is no merge.
    if node.target in _PRODUCTS or len(traced.dependent_inputs(node)) < 2 or is_in_groups(traced, fork, node):
        return
    if any(is_weighted(n) for n in traced.region([fork], node) if n is not node):
        how = "concatenate it" if node.target is _CAT else f"join it by {getattr(node.target, '__name__', node.target)}"
        raise _not_a_chain(node, f"blocks that add their branch to the skip, not {how}")


class _Line:
    """A trunk with its merges: where on it each block begins and ends."""

    def __init__(self, trunk: list[Node], cores: Sequence[_Core]) -> None:
        self.trunk = trunk
        self.position = {node: i for i, node in enumerate(trunk)}
        # A block before a lane ends where the lane is entered, at the latest.
        before = [None, *(core.lane for core in cores)]
        self.forks = [
            core.lane.entry if core.lane and core.lane is not last else core.fork
            for core, last in zip(cores, before, strict=False)
        ]
        self.merges = [core.merge for core in cores]
        self.modules = [module_path(merge) for merge in self.merges]
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
            if not _within(path, own):
                break
            if following is not None and following != own and _within(following, own) and _within(path, following):
                break  # the next block stands inside this one's module and owns the node
            if self._makes_several(own):
                # The module does not tell: an activation or a normalisation that keeps the shape belongs to the merge
                # before it, but at the end of the chain only if one like it follows the merge before.
                if is_weighted(node) or node.meta["val"].shape != merge.meta["val"].shape:
                    break
                if last and not self._follows_the_merge_before(node):
                    break
            end = node
        # A merge of vectors from all places of all examples: the block ends where examples are apart again.
        later = self.trunk[self.position[end] : limit + 1]
        return next((node for node in later if _same_batch(node, self.trunk[0])), end)

    def start_of_first(self) -> Node:
        """Where the first block begins: at the trunk nodes before its fork that stand in its module."""
        own = self.modules[0]
        start = self.position[self.forks[0]]
        if not self._makes_several(own):
            while start > 0 and _within(module_path(self.trunk[start]), own):
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


def _plain_parts(traced: Trace, trunk: list[Node]) -> list[Part]:
    """The modules of a network without skips, as blocks without skip."""
    # Those on the trunk were judged before: nothing with weights stands in them.
    for node in traced.in_order(traced.region([], traced.output) - set(trunk)):
        if node.target in (_ADD, _CAT) and len(traced.dependent_inputs(node)) > 1 and _weighs(traced, node):
            raise _not_a_chain(node, "merges that every route passes; some route leads around this one")
    groups = _plain_groups(traced, trunk)
    if len(groups) < 1:
        raise ResnetPathsError(
            "model", "no block found", "a model that adds branches to skips, or a stack of modules with weights"
        )
    return [Part(module, start, start, end, end, None, (end,)) for module, start, end in groups]


def _plain_groups(traced: Trace, trunk: list[Node]) -> list[tuple[str, Node, Node]]:
    """(Module, start, end) of each plain block: the composite modules on the trunk, or else its weight layers."""
    # A wrapper that holds everything with weights is no more than a name before the others.
    wrapper = common_module(n for n in traced.region([], traced.output) if is_weighted(n))
    units = [_unit(node, wrapper) for node in trunk]
    weighs = {name: False for name, _ in units}
    for before, node, (name, _) in zip([None, *trunk], trunk, units, strict=False):
        region = traced.region([before] if before is not None else [], node)
        weighs[name] |= any(is_weighted(n) for n in region)
    composites = {name for name, composite in units if composite and weighs[name]}
    groups: list[tuple[str, int, int]] = []
    previous = None
    for index, (name, _) in enumerate(units):
        begins = name in composites if composites else weighs[name]
        goes_on = name == previous if begins else not composites
        if begins and not goes_on:
            groups.append((name, index - 1, index))
        elif groups and goes_on:
            groups[-1] = (*groups[-1][:2], index)
        previous = name
    if not composites:  # of a stack of weight layers the first is the stem; the last, which makes the logits, the head
        groups = groups[1:-1]
    return [(name, trunk[a], trunk[b]) for name, a, b in groups if a >= 0]


def _unit(node: Node, wrapper: str) -> tuple[str, bool]:
    """The outermost module inside `wrapper` that is no mere container, and whether it holds modules itself."""
    below = [(name, kind) for name, kind in module_stack(node) if name not in ("", wrapper) and _within(name, wrapper)]
    for depth, (name, kind) in enumerate(below):
        if kind.rsplit(".", 1)[-1] not in _CONTAINERS:
            return name, depth < len(below) - 1
    return "", False


def _weighs(traced: Trace, node: Node) -> bool:
    return any(is_weighted(n) for operand in traced.dependent_inputs(node) for n in [operand, *operand.all_input_nodes])


def common_module(nodes: Iterable[Node]) -> str:
    """The innermost module that holds all nodes, those of the model's own forward aside.

    Args:
        nodes: Nodes of the graph.

    Returns:
        Its name; empty if there is none.
    """
    paths = [path.split(".") for path in map(module_path, nodes) if path]
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in levels)


def _not_a_chain(node: Node, allowed: str) -> ResnetPathsError:
    return ResnetPathsError(
        "model", f"{node.name} ({describe(node)})", allowed,
        "Only networks whose blocks stand in series can be unraveled.",
    )  # fmt: skip


def _within(path: str, module: str) -> bool:
    return module == "" or path == module or path.startswith(module + ".")

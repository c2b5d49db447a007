"""Where a flat graph merges, and what is added up there.

- The *trunk* is the nodes that every route from input to output passes (the dominators of the output).
- A *merge* is an addition on the trunk of values that depend on the input, or a concatenation of branches.
- Its *fork* is its immediate dominator: the point where skip and branches part.

Additions inside a branch, in a squeeze-and-excitation gate or in a polynomial activation are not on the trunk and fall
away by themselves.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import networkx as nx
import torch
from torch.fx import Node

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.weight_layers import is_product, is_weighted, makes_branch
from resnet_paths.unraveling.concatenations import are_apart, concatenated, is_in_groups
from resnet_paths.unraveling.packing import Packed, pack
from resnet_paths.unraveling.parts import LadderStep, Lane, Part
from resnet_paths.unraveling.skips import skip_among
from resnet_paths.unraveling.tracing import Trace, common_module, describe, is_within, module_path

__all__ = [
    "EARLIER_STATE",
    "Core",
    "core_of",
    "is_held",
    "is_merge",
    "owner_of",
    "refuse_node",
    "refuse_other_merge",
    "residual_additions",
    "summands_of",
    "trunk_between",
]

_ADD = torch.ops.aten.add.Tensor
_CAT = torch.ops.aten.cat.default
_PRODUCTS = {
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.div.Tensor,
    operator.add,  # of a layer and its adapter
}

EARLIER_STATE = (
    "What blocks read beside the state before them must be an input of the model, or be made before the first block. "
    "Wrap what follows the earlier state in a module that takes it as an input, and unravel that."
)


def trunk_between(traced: Trace, source: Node | None, target: Node) -> list[Node]:
    """The nodes that every route to a target passes.

    Args:
        traced: The graph.
        source: Where the routes begin; None for the inputs.
        target: Where they end.

    Returns:
        The nodes in order, those of one tensor alone: from the source, or the first after the inputs, to the target.
    """
    return _trunk_to(target, source, _dominators(traced, source, target))


def _dominators(traced: Trace, source: Node | None, target: Node) -> dict[Node | str, Node | str]:
    """For each node on the way the last one that every route to it passes; ``"inputs"`` stands before the inputs."""
    root: Node | str = "inputs" if source is None else source
    graph = nx.DiGraph()
    graph.add_node(root)
    for node in traced.in_order(traced.region([] if source is None else [source], target)):
        before: list[Node | str] = [*traced.dependent_inputs(node)] or ["inputs"]
        graph.add_edges_from((operand, node) for operand in before)
    dominators: dict[Node | str, Node | str] = nx.immediate_dominators(graph, root)
    return dominators


def _trunk_to(target: Node, source: Node | None, dominators: dict[Node | str, Node | str]) -> list[Node]:
    trunk = [target]
    while trunk[-1] is not source and isinstance(before := dominators[trunk[-1]], Node):
        trunk.append(before)
    # Pieces, such as the halves of a state, are between two tensors; no block begins or ends there.
    return [node for node in trunk[::-1] if isinstance(node.meta.get("val"), torch.Tensor)]


@dataclass(frozen=True)
class Core:
    """A merge and what it adds up, before it is known where the block begins and ends; fields as in `Part`."""

    fork: Node
    merge: Node
    skip: Node | None
    branches: tuple[Node, ...]
    onto_skip: bool = False
    ladder: tuple[LadderStep, ...] = ()
    layout: Packed | None = None
    guess: str = ""
    lane: Lane | None = None
    gathering: tuple[Part, ...] = ()


def is_merge(traced: Trace, fork: Node, node: Node, *, parts_too: bool) -> bool:
    """Whether a node adds two values that depend on the input, or concatenates branches, with a weight layer before it.

    Args:
        traced: The graph.
        fork: The node on the trunk before it.
        node: A node on the trunk.
        parts_too: Whether a concatenation whose skip carries over a part of the fork counts; see `concatenated`.

    Returns:
        Whether it is the merge of a block.
    """
    if node.target is _CAT:
        joins = concatenated(traced, fork, node, parts_too=parts_too) is not None
    else:
        joins = node.target is _ADD and len(traced.dependent_inputs(node)) == 2
    return joins and _holds_weights(traced, fork, node)


def _holds_weights(traced: Trace, fork: Node, merge: Node) -> bool:
    """Whether a layer is between fork and merge: x + sin(a x) / a is an activation, not a block."""
    return fork.meta["val"].is_floating_point() and any(map(makes_branch, traced.region([fork], merge)))


def refuse_other_merge(traced: Trace, fork: Node, node: Node) -> None:
    """Refuse what joins computed branches in another way than by adding, such as a concatenation or a difference.

    Args:
        traced: The graph.
        fork: The node on the trunk before it.
        node: A node on the trunk that is no merge.

    Raises:
        ResnetPathsError: If it does.
    """
    # Gates and attention (products) stand inside a segment; a concatenation of slices (patch merging) is no merge.
    if node.target in _PRODUCTS or is_product(node):
        return
    if len(traced.dependent_inputs(node)) < 2 or is_in_groups(traced, fork, node):
        return
    if any(is_weighted(n) for n in traced.region([fork], node) if n is not node):
        if node.target is _ADD and not fork.meta["val"].is_floating_point():
            refuse_node(
                node,
                "one state between the blocks; this adds two, both made from the same integers, such as tokens",
                "An encoder and its decoder, or two towers, are chains of their own: unravel(model.encoder, ...). Or "
                "pass the decoder's input as an argument of its own, such as decoder_input_ids.",
            )
        how = "concatenate it" if node.target is _CAT else f"join it by {getattr(node.target, '__name__', node.target)}"
        refuse_node(node, f"blocks that add their branch to the skip, not {how}")


def core_of(traced: Trace, fork: Node, merge: Node, skips: Sequence[str] = ()) -> Core:
    """Which operands of a merge are the skip and the branches.

    Args:
        traced: The graph.
        fork: The node on the trunk before it.
        merge: The merge.
        skips: Names of modules that are skips, where the graph does not tell.

    Returns:
        The merge and what it adds up.

    Raises:
        ResnetPathsError: If skip and branches share something, or are added with a factor.
    """
    if merge.target is _CAT:
        found = concatenated(traced, fork, merge, parts_too=True)
        assert found is not None  # held by is_merge
        return Core(fork, merge, *found)
    if merge.kwargs.get("alpha", 1) != 1:
        refuse_node(merge, "an addition with alpha=1")
    operands = traced.dependent_inputs(merge)
    summands = summands_of(traced, fork, merge)
    if len(summands) > 2 and _are_alternatives(traced, fork, summands):
        skip, guess = skip_among(traced, fork, summands, skips)
        branches = tuple(s for s in summands if s is not skip)
        return Core(fork, merge, skip, branches, onto_skip=skip is not None and skip not in operands, guess=guess)
    shared = traced.region([fork], operands[0]) & traced.region([fork], operands[1])
    ladder = _ladder(traced, fork, merge, summands) if shared else ()
    layout = pack(fork, merge) if ladder else None
    if layout is not None:
        return Core(fork, merge, None, (), ladder=ladder, layout=layout)
    if shared:
        _refuse_reader_of_the_fork(traced, fork, operands)
        node = traced.in_order(shared)[0]
        refuse_node(node, f"a skip and a branch that share nothing between fork {fork.name} and merge {merge.name}")
    skip, guess = skip_among(traced, fork, operands, skips)
    return Core(fork, merge, skip, tuple(o for o in operands if o is not skip), guess=guess)


def _refuse_reader_of_the_fork(traced: Trace, fork: Node, operands: Sequence[Node]) -> None:
    """Refuse a branch that is made from the skip of its block, a later state, and from the fork."""
    for state, made in itertools.permutations(operands):
        before, region = traced.region([fork], state), traced.region([fork], made)
        readers = [node for node in region - before if fork in node.all_input_nodes]
        if state in region and readers:
            allowed = (
                f"blocks that read the state before them alone, {state.name}; this reads an earlier one, {fork.name}"
            )
            refuse_node(traced.in_order(readers)[0], allowed, EARLIER_STATE)


def residual_additions(traced: Trace) -> list[tuple[Node, Node]]:
    """All additions, wherever they stand, of a value and what a layer makes of it.

    Args:
        traced: The graph.

    Returns:
        (Value, addition), the earliest values first: an addition inside a branch comes after that of its block.
    """
    found = []
    for node in traced.graph.nodes:
        if node.target is not _ADD:
            continue
        for value, other in itertools.permutations(traced.dependent_inputs(node), 2):
            if traced.comes_before(value, other) and _is_made_by_a_layer(traced, value, other):
                found.append((value, node))
    values = {value: i for i, value in enumerate(traced.in_order({value for value, _ in found}))}
    return sorted(found, key=lambda pair: values[pair[0]])


def _is_made_by_a_layer(traced: Trace, value: Node, made: Node) -> bool:
    """Whether a layer is on a way from one node to another."""
    reached: dict[Node, bool] = {}  # whether a layer is on a way from the value to a node

    def passes(node: Node) -> bool | None:
        if node is value:
            return False
        return reached.get(node)

    between, waiting = set(), [made]
    while waiting:
        node = waiting.pop()
        if node not in between and traced.comes_before(value, node):
            between.add(node)
            waiting.extend(traced.dependent_inputs(node))
    for node in traced.in_order(between):
        before = [passed for arg in traced.dependent_inputs(node) if (passed := passes(arg)) is not None]
        if before:
            reached[node] = any(before) or makes_branch(node)
    return reached.get(made, False)


def owner_of(traced: Trace, core: Core) -> str:
    """The module that a merge belongs to: the one whose forward adds, or that holds both the addition and the branch.

    Args:
        traced: The graph, or that of the merge's lane.
        core: The merge.

    Returns:
        The module's name; empty for the model itself.
    """
    path = module_path(core.merge)
    graph = traced if core.lane is None else core.lane.traced
    ends = core.branches or tuple(step.side for step in core.ladder)
    region = set().union(*(graph.region([core.fork], end) for end in ends))
    if core.merge.target is _CAT or any(is_within(module_path(node), path) for node in region):
        return path
    return common_module([core.merge, *region])  # the addition is a module of its own


def summands_of(traced: Trace, fork: Node, merge: Node, *, states: bool = False) -> list[Node]:
    """What a merge adds up, sums of sums written out, from left to right.

    Args:
        traced: The graph.
        fork: The node on the trunk before the merge.
        merge: An addition.
        states: Whether what blocks return, such as x + f(x), is left as it is.

    Returns:
        Its summands.
    """
    found: list[Node] = []
    for operand in traced.dependent_inputs(merge):
        inner = operand is not fork and operand.target is _ADD and operand.kwargs.get("alpha", 1) == 1
        inner = inner and len(operand.users) == 1 and not (states and _adds_branch(traced, operand))
        if inner and len(traced.dependent_inputs(operand)) == len(operand.all_input_nodes):
            found += summands_of(traced, fork, operand, states=states)
        else:
            found.append(operand)
    return found


def _adds_branch(traced: Trace, addition: Node) -> bool:
    """Whether an addition adds to a value what a layer makes of it, and not a later state, which holds it."""
    pairs = itertools.permutations(traced.dependent_inputs(addition), 2)
    made = (pair for pair in pairs if traced.comes_before(*pair) and _is_made_by_a_layer(traced, *pair))
    return any(not is_held(traced, *pair) for pair in made)


def _are_alternatives(traced: Trace, fork: Node, summands: Sequence[Node]) -> bool:
    """Whether values go from the fork to the merge side by side: no two share a weight layer, at most one has none."""
    # A normalisation that they share, as parallel attention and MLP do, is computed by each of them.
    weighted = [{n for n in traced.region([fork], s) if is_weighted(n)} for s in summands]
    apart = are_apart(weighted)
    return len(set(summands)) == len(summands) and apart and sum(not layers for layers in weighted) <= 1


def _ladder(traced: Trace, fork: Node, merge: Node, summands: Sequence[Node]) -> tuple[LadderStep, ...]:
    """The blocks of a ladder: each summand is made from one of the values x along a line of residual additions."""
    dominators = _dominators(traced, fork, merge)
    rails = {summand: _trunk_to(summand, fork, dominators) for summand in summands}
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
    number = {x: i for i, x in enumerate(values)}
    made_from = {next((number[x] for x in reversed(trunk) if x in number), 0): s for s, trunk in rails.items()}
    if sorted(made_from) != list(range(len(values))):
        return ()
    branches = [next(o for o in traced.dependent_inputs(merge) if o is not x) for x, merge in steps]
    ladder = [
        LadderStep(x, merge, b, made_from[i]) for i, ((x, merge), b) in enumerate(zip(steps, branches, strict=True))
    ]
    ladder.append(LadderStep(values[-1], None, None, made_from[len(steps)]))
    read = [(step.fork, made) for step in ladder for made in (step.branch, step.side) if made is not None]
    if any(fork in traced.region([x], made) for x, made in read if x is not fork and made is not x):
        return ()  # a block reads the fork beside its own value
    if not all(_shares_layers(traced, step) for step in ladder):
        return ()  # a sum of states, each of which holds the one before
    return tuple(ladder)


def _shares_layers(traced: Trace, step: LadderStep) -> bool:
    """Whether a layer makes both what a step adds to x and what it adds to the sum, and neither holds x itself."""
    made = [node for node in (step.branch, step.side) if node is not None]
    shared = set.intersection(*(traced.region([step.fork], node) for node in made))
    return any(map(is_weighted, shared)) and not any(is_held(traced, step.fork, node) for node in made)


def is_held(traced: Trace, value: Node, node: Node) -> bool:
    """Whether a node holds a value by way of skips: whether a way from one to the other passes no layer.

    Args:
        traced: The graph.
        value: The value.
        node: A node that is computed from it.

    Returns:
        Whether there is such a way.
    """
    reached = {value}
    for each in traced.in_order(traced.region([value], node)):
        if not makes_branch(each) and not reached.isdisjoint(traced.dependent_inputs(each)):
            reached.add(each)
    return node in reached


def refuse_node(
    node: Node, allowed: str, advice: str = "Only networks whose blocks are in series can be unraveled."
) -> NoReturn:
    """Refuse a graph that is no chain.

    Args:
        node: The node that breaks it.
        allowed: What would be a chain.
        advice: What to do.

    Raises:
        ResnetPathsError: Always.
    """
    raise ResnetPathsError(
        "model",
        f"{node.name} ({describe(node)})",
        allowed,
        advice,
    )

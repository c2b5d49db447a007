"""Lanes: blocks in a row that read, beside their own value, what none of them changes.

The class token of CaiT attends to patches that stay as they are; every block of a GCViT stage reads one global query.
What they read is made from the state before them, not from the inputs alone, so it is in their state.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import networkx as nx
import torch
from torch.fx import Node

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.unraveling.merges import Core, core_of, is_merge, trunk_between
from resnet_paths.unraveling.packing import pack
from resnet_paths.unraveling.parts import Lane
from resnet_paths.unraveling.tracing import Trace

__all__ = ["find_lane", "same_batch"]

_CAT = torch.ops.aten.cat.default


def find_lane(traced: Trace, entry: Node, merge: Node) -> list[Core]:
    """The blocks of a lane that leads to a merge.

    Args:
        traced: The graph.
        entry: The last value before them.
        merge: The addition at which they end.

    Returns:
        The merges of the lane; none if the values on the way to the merge are no lane.
    """
    if traced.given or any(node.op != "placeholder" for node in traced.inputs):
        return []  # in another lane
    best: list[Core] = []
    inside = traced.region([entry], merge)
    # The first value may be a parameter, such as a class token.
    firsts = traced.in_order(inside | {arg for node in inside for arg in node.all_input_nodes} - {entry, merge})
    for first in firsts:
        if len(first.users) < 2 or not _is_batch(first, entry):
            continue
        reduced = Trace(traced.graph, [first], traced.output, traced.tensors)
        if not reduced.depends_on_input(merge):
            continue
        trunk = trunk_between(reduced, first, merge)
        try:
            cores = _cores(reduced, trunk)
        except ResnetPathsError:
            continue
        if any(core.skip is not core.fork or core.merge.target is _CAT for core in cores):
            continue  # streams that meet again and again (HRNet) are no run of residual blocks
        # One block alone is none of several that read the same.
        carried = _read_beside(traced, reduced, first, merge) if len(cores) > max(len(best), 1) else None
        if carried and cores[-1].merge is merge and all(node is entry or node in inside for node in carried):
            layout = pack(first, *carried)
            if layout is not None:
                lane = Lane(reduced, entry, tuple(trunk), layout)
                best = [replace(core, lane=lane) for core in cores]
    return best


def _cores(traced: Trace, trunk: list[Node]) -> list[Core]:
    pairs = itertools.pairwise(trunk)
    return [core_of(traced, *pair) for pair in pairs if is_merge(traced, *pair, parts_too=False)]


def _is_batch(node: Node, other: Node) -> bool:
    return all(isinstance(n.meta.get("val"), torch.Tensor) for n in (node, other)) and same_batch(node, other)


def _read_beside(traced: Trace, reduced: Trace, start: Node, end: Node) -> list[Node] | None:
    """What is read on the way from one node to another that is not made from the first.

    Args:
        traced: The graph.
        reduced: The same where only what is made from `start` counts as dependent.
        start: Where the way begins.
        end: Where it ends.

    Returns:
        The last value from which all of it is made, or else the inputs; None if that cannot be part of a state.
    """
    behind = reduced.region([start], end)
    read = {arg for node in behind for arg in node.all_input_nodes if _is_given(traced, reduced, arg)}
    if not read:
        return []
    graph = nx.DiGraph()
    graph.add_edges_from((node, "read") for node in read)
    for node in set().union(*(traced.region([], node) for node in read)):
        before: list[Node | str] = [*traced.dependent_inputs(node)]
        graph.add_edges_from((arg, node) for arg in before or ["inputs"])
    dominators: dict[Node | str, Node | str] = nx.immediate_dominators(graph, "inputs")
    last = dominators["read"]
    while isinstance(last, Node):  # and not before the inputs
        if _fits(last, start):
            return [last]
        last = dominators[last]
    inputs = [node for node in traced.inputs if node in graph]
    return inputs if all(_fits(node, start) for node in inputs) else None


def _is_given(traced: Trace, reduced: Trace, node: Node) -> bool:
    return traced.depends_on_input(node) and not reduced.depends_on_input(node)


def _fits(node: Node, start: Node) -> bool:
    """Whether a value has a row for each example, or one for all."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and (_is_row(node) or _batch(node) == _batch(start))


def _batch(node: Node) -> str:
    return str(node.meta["val"].shape[0])


def _is_row(node: Node) -> bool:
    return _batch(node) == "1"


def same_batch(one: Node, other: Node) -> bool:
    """Whether two tensors have the same size in dimension 0."""
    sizes = [node.meta["val"].shape[:1] for node in (one, other)]
    return len(sizes[0]) == len(sizes[1]) == 1 and str(sizes[0][0]) == str(sizes[1][0])

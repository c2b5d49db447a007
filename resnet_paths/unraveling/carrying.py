"""What blocks read beside the value that they work on, and how it is carried along."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch.fx import Node

from resnet_paths.core.tuple_states import Carried
from resnet_paths.unraveling.tracing import Trace

__all__ = ["kind_of", "read_beside"]


def read_beside(traced: Trace, reduced: Trace, start: Node, end: Node) -> list[Node] | None:
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
        before: list[Any] = [*traced.dependent_inputs(node)] or ["inputs"]
        graph.add_edges_from((arg, node) for arg in before)
    dominators: dict[Any, Any] = nx.immediate_dominators(graph, "inputs")
    node = dominators["read"]
    while node != "inputs":
        if _fits(node, start):
            return [node]
        node = dominators[node]
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


def kind_of(node: Node) -> Carried:
    """How a value is carried along.

    Args:
        node: The value.

    Returns:
        Its kind: without a gradient if it, or all that it is made from, is no floating number.
    """
    sources, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current not in sources:
            sources.add(current)
            waiting.extend(current.all_input_nodes)
    inputs = [n for n in sources if n.op == "placeholder"]
    has_gradient = all(any(map(_is_floating, nodes)) for nodes in ([node], inputs))
    return Carried(node.meta["val"].dtype, _is_row(node), not has_gradient)


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()

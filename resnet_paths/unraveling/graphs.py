"""Flat graphs: questions about their nodes, and how to change one. Shared by the trace, its rewrites and the finder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeGuard

import torch
from torch.fx import Graph, Node, map_arg
from torch.fx.node import Argument

__all__ = ["between", "dependents", "dimension", "insert", "is_alike", "is_shape", "replace", "walk_back"]


def is_shape(node: Node) -> bool:
    """Whether a node's value is a number read off a shape, not a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat | int | bool | float)


def dependents(graph: Graph, inputs: Iterable[Node], given: Iterable[Node] = ()) -> set[Node]:
    """The nodes whose values, not only their shapes, depend on some others.

    Args:
        graph: The graph.
        inputs: These others; they are included.
        given: Nodes on which nothing counts as dependent; they are not.

    Returns:
        The nodes.
    """
    given = set(given)
    found = set(inputs) - given
    for node in graph.nodes:
        if node not in given and not is_shape(node) and any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found


def walk_back(target: Node, stop: set[Node], before: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """All nodes on the way back from `target`, which is included, up to those in `stop`, which are not."""
    found: set[Node] = set()
    waiting = [target]
    while waiting:
        node = waiting.pop()
        if node not in found and node not in stop:
            found.add(node)
            waiting.extend(before(node))
    return found


def between(source: Node, target: Node) -> set[Node]:
    """The nodes on all routes from one node to another; a value that depends on a shape alone is on none.

    Args:
        source: Where the routes begin; not included.
        target: Where they end; included.

    Returns:
        The nodes; none where `target` is not computed from the values of `source`.
    """
    behind = walk_back(target, {source}, lambda node: (arg for arg in node.all_input_nodes if not is_shape(arg)))
    found: set[Node] = set()
    waiting = [source]
    while waiting:
        later = {user for user in waiting.pop().users if user in behind and user not in found}
        found |= later
        waiting.extend(later)
    return found


def dimension(cat: Node) -> int:
    """The dimension along which a node concatenates or stacks, counted from 0, the batch.

    Args:
        cat: The node.

    Returns:
        A number of at least 0.
    """
    dim = cat.args[1] if len(cat.args) > 1 else 0
    assert isinstance(dim, int)
    return dim % int(cat.meta["val"].dim())


def is_alike(one: object, other: Node) -> TypeGuard[Node]:
    """Whether two arguments are nodes whose values are tensors of the same shape and dtype."""
    if not isinstance(one, Node):
        return False
    # As text: a comparison of symbolic sizes would add a guard to them.
    first, second = (
        (value.dtype, str(value.shape)) if isinstance(value, torch.Tensor) else None
        for value in (one.meta.get("val"), other.meta.get("val"))
    )
    return first is not None and first == second


def insert(node: Node, target: Callable[..., object], *args: Argument, **kwargs: Argument) -> Node:
    """Insert an operation into a graph.

    Args:
        node: The node before which it is inserted; the new node counts as made in the same module.
        target: The operation.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        The new node, with its value in ``meta["val"]``.
    """
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args, kwargs)
    values = map_arg((args, kwargs), lambda each: each.meta["val"])
    made.meta = {**node.meta, "val": target(*values[0], **values[1])}
    return made


def replace(node: Node, by: Node) -> None:
    """Let all readers of a node read another one; remove the node, and whatever is then read by no other.

    Args:
        node: The node.
        by: What is read in its place.
    """
    node.replace_all_uses_with(by)
    waiting = [node]
    while waiting:
        unread = waiting.pop()
        if unread.op == "call_function" and not unread.users:
            operands = unread.all_input_nodes
            node.graph.erase_node(unread)
            waiting.extend(operands)

"""What blocks and head read in addition to the state: which values of the stem are their context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node

from resnet_paths.unraveling.graphs import is_shape
from resnet_paths.unraveling.packing import values_of
from resnet_paths.unraveling.parts import Part
from resnet_paths.unraveling.tracing import IS_CONTEXT, Trace

__all__ = ["context_of"]

_STEM = -1


def context_of(traced: Trace, parts: Sequence[Part]) -> list[Node]:
    """The values that the stem computes for blocks and head to read.

    What depends on the input but not on the first state is computed by the one block that reads it, where only one
    does, such as a block's own projection of a time embedding. What several of them read is context.

    Args:
        traced: The graph, with all its inputs.
        parts: The blocks, in order.

    Returns:
        Nodes in the order of the graph; none for most networks.
    """
    start = parts[0].start
    sources = values_of(start)
    readers = _readers(traced, parts, sources)
    needed = _needed(traced.output, sources)
    beside = [node for node in needed if node not in readers and traced.depends_on_input(node)]
    if not beside:
        return []
    stem = _needed(sources[0], [])
    owners: dict[Node, set[int]] = {node: {_STEM} if node in stem else set() for node in beside}
    users = {node: [user for user in node.users if user in needed or user in stem] for node in beside}
    for node in reversed(traced.in_order(beside)):
        for user in users[node]:
            owners[node] |= owners.get(user, {readers.get(user, _STEM)})
    inside: set[Node] = set()  # computed by the block, or the head, that reads it
    for node in traced.in_order(beside):
        given = [arg for arg in node.all_input_nodes if arg in owners and arg not in inside]
        made_before = node.op == "placeholder" or IS_CONTEXT in node.meta
        alone = len(owners[node]) == 1 and _STEM not in owners[node] and not made_before
        if alone and all(map(_is_tensor, given)):
            inside.add(node)
    inner = {node for node, index in readers.items() if index != _STEM} | inside
    read = (node for node in beside if node not in inside and not inner.isdisjoint(users[node]))
    return traced.in_order(read)


def _readers(traced: Trace, parts: Sequence[Part], sources: Iterable[Node]) -> dict[Node, int]:
    """For each node that depends on the first state the position of the block that computes it; the head's is last."""
    found = dict.fromkeys(sources, _STEM)
    waiting = list(found)
    while waiting:
        for user in waiting.pop().users:
            if user not in found and not is_shape(user) and IS_CONTEXT not in user.meta:
                found[user] = len(parts)
                waiting.append(user)
    for index, part in enumerate(parts):
        before = set(values_of(part.start))
        for end in values_of(part.end):
            for node in _needed(end, before):
                if found.get(node) == len(parts):
                    found[node] = index
    return found


def _needed(target: Node, stop: Iterable[Node]) -> set[Node]:
    """All nodes whose values a target is computed from, itself included, up to those in `stop`, which are left out."""
    stop, found, waiting = set(stop), set(), [target]
    while waiting:
        node = waiting.pop()
        if node not in found and node not in stop:
            found.add(node)
            # Parts read sizes off the state, and the stem computes what is context.
            waiting.extend(() if is_shape(node) or IS_CONTEXT in node.meta else node.all_input_nodes)
    return found


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)

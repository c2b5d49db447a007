"""Skips that only rearrange the entries of x, such as ``x.flatten(1)`` or ``x.clone()``: the addition is made first.

A rearrangement R keeps every entry, so ``R(x) + f`` is ``R(x + R^-1(f))``, bit for bit, and the skip of that addition
is x itself. ``x.detach()`` is not a view in this sense: it keeps the entries and not their gradient.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from resnet_paths.unraveling.graphs import insert, is_alike, replace
from resnet_paths.unraveling.rewrites.branches import KEEPING_ORDER, PERMUTING, rearranges, source_of_branch

__all__ = ["move_rearrangements", "remove_round_trips"]

_ATEN = torch.ops.aten
_ADD = _ATEN.add.Tensor


def move_rearrangements(graph: Graph) -> None:
    """Write ``R(x) + f`` as ``R(x + R^-1(f))`` where f is computed from x, and R(x) is read by the addition alone.

    Entries are the same bit for bit. Where R(x) is read by the branch as well, as in networks that work on flattened
    tensors for a while, it is the identity skip already.

    Args:
        graph: The graph; it is changed.
    """
    waiting = [node for node in graph.nodes if node.target is _ADD and not node.kwargs]
    for node in waiting:
        for moved, other in (node.args, node.args[::-1]):
            if not is_alike(moved, node) or not is_alike(other, node) or not _is_moved_for(moved, node):
                continue
            x = moved.all_input_nodes[0]
            source = source_of_branch(x, other)
            undone = None if source is None else _undone(node, moved, other, source)
            if undone is None:
                continue
            total = insert(node, _ADD, *((x, undone) if moved is node.args[0] else (undone, x)))
            assert callable(moved.target)  # an operation
            replace(node, insert(node, moved.target, total, *moved.args[1:], **moved.kwargs))
            waiting.append(total)  # x may be a rearrangement itself
            break


def _is_moved_for(moved: Node, reader: Node) -> bool:
    """Whether a node rearranges a value for one reader alone."""
    return rearranges(moved) and list(moved.users) == [reader]


def _undone(node: Node, moved: Node, value: Node, source: Node) -> Node | None:
    """The inverse of a rearrangement, applied to a value and inserted before a node; None if sizes are unknown."""
    if moved.target in PERMUTING:
        order = _order_of(moved)
        return insert(node, _ATEN.permute.default, value, [order.index(dim) for dim in range(len(order))])
    before = moved.all_input_nodes[0]
    if is_alike(value, before):
        return value
    # The value is computed from the source, which may therefore be read for sizes that vary.
    varying = [str(size) for size in source.meta["val"].shape]
    sizes: list[int | Node] = []
    for size in before.meta["val"].shape:
        if isinstance(size, int):
            sizes.append(size)
        elif str(size) in varying:
            sizes.append(insert(node, _ATEN.sym_size.int, source, varying.index(str(size))))
        else:
            sizes.append(-1)
    return insert(node, _ATEN.reshape.default, value, sizes) if sizes.count(-1) < 2 else None


def _order_of(node: Node) -> list[int]:
    """Which dimension of its operand each dimension of a permuting node is, read off a small tensor."""
    sizes = list(range(2, 2 + node.meta["val"].dim()))
    permuted = node.target(torch.empty(sizes, device="meta"), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [size - 2 for size in permuted.shape]


def remove_round_trips(graph: Graph) -> None:
    """Remove rearrangements that end where they began, such as ``x.flatten(1).view(x.shape)`` and ``x.clone()``.

    A value that comes back in another memory layout stays: kernels may round differently for it. So does one without
    the batch in dimension 0: on the way back examples may be apart, as they have to be between blocks. And so does one
    whose rearrangement has other readers, such as a skip: all of them part there.

    Args:
        graph: The graph; it is changed.
    """
    inputs = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    batches = {str(x.shape[:1]) for x in inputs if isinstance(x, torch.Tensor) and x.dim()}
    for node in list(graph.nodes):
        start = _start_of_round_trip(node)
        if start is not None and str(start.meta["val"].shape[:1]) in batches:
            replace(node, start)


def _start_of_round_trip(node: Node) -> Node | None:
    """The earliest value that a node restores; None if it restores none."""
    found = None
    if node.target in KEEPING_ORDER:
        before = node
        while before.target in KEEPING_ORDER and rearranges(before) and _is_read_once(before, node):
            before = before.all_input_nodes[0]
            found = before if is_alike(before, node) and _layout(before) == _layout(node) else found
    elif node.target in PERMUTING:
        before, order = node, list(range(node.meta["val"].dim()))
        while before.target in PERMUTING and _is_read_once(before, node):
            step = _order_of(before)
            order, before = [step[dim] for dim in order], before.all_input_nodes[0]
            found = before if order == sorted(order) else found
    return found


def _is_read_once(before: Node, node: Node) -> bool:
    return before is node or len(before.users) == 1


def _layout(node: Node) -> str:
    return str(node.meta["val"].stride())

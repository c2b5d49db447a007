"""Concatenations as blocks: branches side by side, each placed into its own channels of a wider space.

- ``cat(x, f(x))``, a layer of a DenseNet: x is the skip.
- ``cat(a(x), b(x), c(x))``, an Inception module: alternatives without a skip; pooling without weights is one.
- ``cat(left half of x, f(right half))``, a ShuffleNet unit: the half that is carried over is the skip.

``cat(y[:, :k] + x, y[:, k:])``, a partial residual (ReXNet), is ``y + x`` with zeros behind x, and written so.
A concatenation of mere slices (the patch merging of Swin) or with a constant (a class token) is none, and neither is
one that puts a convolution in groups together again (MixNet): they stand inside a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch
from torch.fx import Node

from resnet_paths.core.weight_layers import is_weighted
from resnet_paths.unraveling.tracing import Trace

__all__ = [
    "are_apart",
    "concatenated",
    "dimension",
    "is_in_groups",
    "nest_concatenations",
    "write_partial_additions",
]

_ATEN = torch.ops.aten
_CAT = _ATEN.cat.default
_SLICES = {
    _ATEN.slice.Tensor,
    _ATEN.select.int,
    _ATEN.narrow.default,
    _ATEN.split.Tensor,
    _ATEN.split_with_sizes.default,
    _ATEN.split.sizes,
    _ATEN.chunk.default,
    _ATEN.tensor_split.sections,
    _ATEN.unbind.int,
}


def are_apart(regions: Sequence[set[Node]]) -> bool:
    """Whether no two of several sets of nodes have a node in common."""
    return sum(map(len, regions)) == len(set().union(*regions))


def dimension(cat: Node) -> int:
    """The dimension along which a node concatenates, batch counted.

    Args:
        cat: The node.

    Returns:
        A number of at least 0.
    """
    dim: Any = cat.args[1] if len(cat.args) > 1 else 0
    return int(dim) % int(cat.meta["val"].dim())


def concatenated(
    traced: Trace, fork: Node, node: Node, *, parts_too: bool
) -> tuple[Node | None, tuple[Node, ...]] | None:
    """Skip and branches of a concatenation on the trunk.

    Args:
        traced: The graph.
        fork: The tensor on the trunk before it.
        node: The concatenation.
        parts_too: Whether a skip that carries over only a part of the fork makes a block too. Inside a branch it does
            not: what a branch does with a part of its channels is its own affair.

    Returns:
        The skip, None where there is none, and the branches; None if it is no merge.
    """
    operands = list(node.args[0])  # type: ignore[arg-type]
    if dimension(node) == 0 or len(set(operands)) < len(operands):
        return None
    if not all(traced.depends_on_input(operand) for operand in operands):
        return None
    layers = [{n for n in traced.region([fork], operand) if is_weighted(n)} for operand in operands]
    skips = [operand for operand, found in zip(operands, layers, strict=True) if not found]
    if fork in operands:
        skips = [fork]
    if len(skips) > 1 or not are_apart(layers) or len(operands) < 2:
        return None
    if all(_reads_a_part(traced, fork, operand) for operand in operands) and not (skips and parts_too):
        return None
    skip = skips[0] if skips else None
    return skip, tuple(operand for operand in operands if operand is not skip)


def _reads_a_part(traced: Trace, fork: Node, operand: Node) -> bool:
    """Whether an operand is made from slices of the fork alone."""
    readers = [n for n in traced.region([fork], operand) if fork in n.all_input_nodes]
    return bool(readers) and all(n.target in _SLICES for n in readers)


def is_in_groups(traced: Trace, fork: Node, node: Node) -> bool:
    """Whether a node concatenates what is made from slices of the fork alone, as a convolution in groups does."""
    return node.target is _CAT and all(_reads_a_part(traced, fork, o) for o in traced.dependent_inputs(node))


def nest_concatenations(traced: Trace) -> Trace:
    """Write ``cat(x, f, g)`` with f = F(x) and g = G(f) as ``cat(x, cat(f, g))``: a block inside a block.

    The features of a one-shot aggregation (VoVNet) and of the trees of a DLA are put together so.

    Args:
        traced: The graph; it is changed.

    Returns:
        The trace of the changed graph.
    """
    waiting = [n for n in traced.graph.nodes if n.target is _CAT and len(n.args[0]) > 2 and dimension(n) > 0]
    while waiting:
        forks = _forks(traced)
        inner = [made for node in waiting if node in forks for made in _nest(traced, forks[node], node)]
        traced = Trace(traced.graph, traced.inputs, traced.output, traced.tensors) if inner else traced
        waiting = [node for node in inner if len(node.args[0]) > 2]  # type: ignore[arg-type]
    return traced


def write_partial_additions(traced: Trace) -> Trace:
    """Write ``cat(y[:, :k] + x, y[:, k:])`` as ``y + pad(x)``: an addition whose skip is padded with zeros.

    Args:
        traced: The graph; it is changed.

    Returns:
        The trace of the changed graph.
    """
    changed = False
    for node in list(traced.graph.nodes):
        found = _partial_addition(node)
        if found is None:
            continue
        whole, added, after = found
        dim, rank = dimension(node), node.meta["val"].dim()
        pad = [0, 0] * (rank - 1 - dim) + [0, after]
        with traced.graph.inserting_before(node):
            padded = traced.graph.call_function(_ATEN.constant_pad_nd.default, (added, pad))
            total = traced.graph.call_function(_ATEN.add.Tensor, (whole, padded))
        padded.meta = total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        traced.graph.erase_node(node)
        changed = True
    return Trace(traced.graph, traced.inputs, traced.output, traced.tensors) if changed else traced


def _partial_addition(node: Node) -> tuple[Node, Node, int] | None:
    """(y, x, width of what nothing is added to) of ``cat(y[:, :k] + x, y[:, k:])``."""
    if node.target is not _CAT or len(node.args[0]) != 2:  # type: ignore[arg-type]
        return None
    dim, operands = dimension(node), list(node.args[0])  # type: ignore[arg-type]
    total, rest = operands
    if total.target is not _ATEN.add.Tensor or total.kwargs or rest.target is not _ATEN.slice.Tensor:
        return None
    for first, added in (total.args, total.args[::-1]):
        if not isinstance(first, Node) or not isinstance(added, Node) or first.target is not _ATEN.slice.Tensor:
            continue
        whole = first.args[0]
        if whole is not rest.args[0] or first.meta["val"].shape != added.meta["val"].shape:
            continue
        width, left = (int(n.meta["val"].shape[dim]) for n in (first, rest))
        from_start, from_width = first.args[1:3] == (dim, 0), rest.args[1:3] == (dim, width)
        if from_start and from_width and whole.meta["val"].shape[dim] == width + left:
            return whole, added, left
    return None


def _forks(traced: Trace) -> dict[Node, Node]:
    """For each node the last tensor that every route from the inputs to it passes, where there is one."""
    graph = nx.DiGraph()
    for node in traced.in_order(traced.region([], traced.output)):
        before: list[Any] = [*traced.dependent_inputs(node)] or ["inputs"]
        graph.add_edges_from((operand, node) for operand in before)
    dominators = nx.immediate_dominators(graph, "inputs")
    forks = {}
    for node in graph:
        fork = dominators.get(node)
        while isinstance(fork, Node) and not isinstance(fork.meta.get("val"), torch.Tensor):
            fork = dominators.get(fork)
        if isinstance(fork, Node):
            forks[node] = fork
    return forks


def _nest(traced: Trace, fork: Node, node: Node) -> list[Node]:
    """Put operands that share weight layers into a concatenation of their own; the new ones."""
    operands = list(node.args[0])  # type: ignore[arg-type]
    layers = {o: {n for n in traced.region([fork], o) if is_weighted(n)} if o is not fork else set() for o in operands}
    groups: list[list[Node]] = []
    for operand in operands:
        if groups and any(layers[operand] & layers[other] for other in groups[-1]):
            groups[-1].append(operand)
        else:
            groups.append([operand])
    if len(groups) == 1:
        return []
    inner = []
    for group in filter(lambda group: len(group) > 1, groups):
        with traced.graph.inserting_before(node):
            made = traced.graph.call_function(_CAT, (group, dimension(node)))
        made.meta = dict(node.meta) | {"val": torch.cat([n.meta["val"] for n in group], dimension(node))}
        inner.append(made)
        operands[operands.index(group[0]) : operands.index(group[-1]) + 1] = [made]
    node.args = (operands, *node.args[1:])
    return inner

"""Concatenations written as blocks that follow one another, or that contain one another."""

from __future__ import annotations

import networkx as nx
import torch
from torch.fx import Graph, Node

from resnet_paths.core.weight_layers import is_weighted
from resnet_paths.unraveling.graphs import dependents, dimension, insert, replace, walk_back

__all__ = ["extend_concatenations", "nest_concatenations", "write_partial_additions"]

_ATEN = torch.ops.aten
_CAT = _ATEN.cat.default


def extend_concatenations(graph: Graph) -> None:
    """Write ``cat(x, f1, f2)`` as ``cat(cat(x, f1), f2)`` where the graph holds ``cat(x, f1)``.

    A DenseNet concatenates all earlier features again in every layer; written so, each layer extends the one before.
    The concatenation of a single tensor is that tensor. Entries are the same bit for bit.

    Args:
        graph: The graph; it is changed.
    """
    earlier: dict[tuple[object, ...], Node] = {}
    for node in list(graph.nodes):
        if node.target is not _CAT:
            continue
        operands, dim = list(node.args[0]), node.args[1] if len(node.args) > 1 else 0
        if len(operands) == 1:
            replace(node, operands[0])
            continue
        before = earlier.get((dim, *operands[:-1]))
        earlier[dim, *operands] = node
        if before is not None:
            node.args = ([before, operands[-1]], dim)


def write_partial_additions(graph: Graph) -> None:
    """Write ``cat(y[:, :k] + x, y[:, k:])`` as ``y + pad(x)``: an addition whose skip is padded with zeros.

    So does ReXNet. Entries are the same except for the sign of zero: -0 + 0 is +0.

    Args:
        graph: The graph; it is changed.
    """
    for node in list(graph.nodes):
        found = _partial_addition(node)
        if found is not None:
            whole, added, after = found
            pad = [0, 0] * (node.meta["val"].dim() - 1 - dimension(node)) + [0, after]
            padded = insert(node, _ATEN.constant_pad_nd.default, added, pad)
            replace(node, insert(node, _ATEN.add.Tensor, whole, padded))


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


def nest_concatenations(graph: Graph) -> None:
    """Write ``cat(x, f, g)`` with f = F(x) and g = G(f) as ``cat(x, cat(f, g))``: a block inside a block.

    The features of a one-shot aggregation (VoVNet) and of the trees of a DLA are put together so. Entries are the same
    bit for bit.

    Args:
        graph: The graph; it is changed.
    """
    waiting = [n for n in graph.nodes if n.target is _CAT and len(n.args[0]) > 2 and dimension(n) > 0]
    while waiting:
        varying = dependents(graph, (node for node in graph.nodes if node.op == "placeholder"))
        forks = _forks(graph, varying)
        inner = [made for node in waiting if node in forks for made in _nest(varying, forks[node], node)]
        waiting = [node for node in inner if len(node.args[0]) > 2]  # type: ignore[arg-type]


def _forks(graph: Graph, varying: set[Node]) -> dict[Node, Node]:
    """For each varying node the last tensor that every route from the inputs to it passes, where there is one."""
    routes = nx.DiGraph()
    for node in graph.nodes:
        if node in varying:
            before = [arg for arg in node.all_input_nodes if arg in varying]
            routes.add_edges_from((operand, node) for operand in before or ["inputs"])
    dominators = nx.immediate_dominators(routes, "inputs")
    forks = {}
    for node in routes:
        fork = dominators.get(node)
        while isinstance(fork, Node) and not isinstance(fork.meta.get("val"), torch.Tensor):
            fork = dominators.get(fork)
        if isinstance(fork, Node):
            forks[node] = fork
    return forks


def _nest(varying: set[Node], fork: Node, node: Node) -> list[Node]:
    """Put operands that share weight layers into a concatenation of their own; the new ones."""

    def layers_of(operand: Node) -> set[Node]:
        region = walk_back(operand, {fork}, lambda n: (arg for arg in n.all_input_nodes if arg in varying))
        return set(filter(is_weighted, region))

    operands = list(node.args[0])  # type: ignore[arg-type]
    layers = {operand: layers_of(operand) for operand in operands}
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
        made = insert(node, _CAT, group, dimension(node))
        inner.append(made)
        operands[operands.index(group[0]) : operands.index(group[-1]) + 1] = [made]
    node.args = (operands, *node.args[1:])
    return inner

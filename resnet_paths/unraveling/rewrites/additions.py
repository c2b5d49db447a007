"""Residual additions that an exported graph holds as other operations, written as ``x + f``."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from resnet_paths.unraveling.graphs import dimension, insert, is_alike, replace
from resnet_paths.unraveling.rewrites.branches import source_of_branch

__all__ = [
    "remove_neutral_numbers",
    "write_multiples_as_additions",
    "write_products_apart",
    "write_sums_as_additions",
]

_ATEN = torch.ops.aten
_ADD, _SUB, _RSUB, _MUL = _ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.rsub.Tensor, _ATEN.mul.Tensor
_NEUTRAL = {_ADD: 0, _SUB: 0, _MUL: 1, _ATEN.div.Tensor: 1}
_FUSED = {
    _ATEN.addmm.default: _ATEN.mm.default,
    _ATEN.baddbmm.default: _ATEN.bmm.default,
    _ATEN.addcmul.default: _MUL,
}


def remove_neutral_numbers(graph: Graph) -> None:
    """Remove additions of 0 and multiplications by 1: ``sum([x, f])`` begins with ``x + 0``.

    The values are the same except for the sign of zero: -0 + 0 is +0.

    Args:
        graph: The graph; it is changed.
    """
    for node in list(graph.nodes):
        if node.target not in _NEUTRAL:
            continue
        x, number = node.args
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if is_number and number == _NEUTRAL[node.target] and is_alike(x, node):
            replace(node, x)


def write_sums_as_additions(graph: Graph) -> None:
    """Write ``torch.stack([x, f, g], dim).sum(dim)`` as ``(x + f) + g``, and a mean as the same divided by 3.

    The sum and the mean of two tensors are the same bit for bit, except where a sum of half-precision numbers is too
    large for their dtype and their mean is not. Those of three and more may differ by rounding.

    Args:
        graph: The graph; it is changed.
    """
    for node in list(graph.nodes):
        summands = _stacked_and_summed(node)
        if not summands:
            continue
        total = summands[0]
        for summand in summands[1:]:
            total = insert(node, _ADD, total, summand)
        is_mean = node.target is _ATEN.mean.dim
        replace(node, insert(node, _ATEN.div.Tensor, total, len(summands)) if is_mean else total)


def _stacked_and_summed(node: Node) -> list[Node]:
    """What a node sums up over the dimension along which it was stacked for it alone; empty if it is no such sum."""
    if node.target not in (_ATEN.sum.dim_IntList, _ATEN.mean.dim) or len(node.args) != 2 or node.kwargs:
        return []
    stack, dims = node.args
    if not isinstance(stack, Node) or stack.target is not _ATEN.stack.default or len(stack.users) != 1:
        return []
    summands = stack.all_input_nodes
    rank = stack.meta["val"].dim()
    along = [dim % rank for dim in dims] == [dimension(stack)]  # type: ignore[union-attr]
    return list(summands) if along and all(is_alike(summand, node) for summand in summands) else []


def write_products_apart(graph: Graph) -> None:
    """Write ``torch.addmm(x, h, w)`` as ``x + h @ w``, and likewise ``torch.baddbmm`` and ``torch.addcmul``.

    The two forms differ by rounding. Where x is multiplied by a factor (``beta``), the operation stays as it is.

    Args:
        graph: The graph; it is changed.
    """
    for node in list(graph.nodes):
        if node.target not in _FUSED or node.kwargs.get("beta", 1) != 1 or not is_alike(node.args[0], node):
            continue
        x, *factors = node.args
        branch = insert(node, _FUSED[node.target], *factors)
        if source_of_branch(x, branch) is None:
            graph.erase_node(branch)
            continue
        number = node.kwargs.get("alpha", node.kwargs.get("value", 1))
        replace(node, insert(node, _ADD, x, _multiple(node, branch, number)))


def write_multiples_as_additions(graph: Graph) -> None:
    """Write ``torch.add(x, f, alpha=a)`` as ``x + a * f`` and ``x - f`` as ``x + (-f)``.

    A difference is the same bit for bit; a product with another number than -1 is rounded once more. Where f is not
    computed from x, ``x - f`` is no block with an identity skip, and stays a difference: that of two towers, for one.
    ``a * x + b * f`` stays as well: its skip is ``a * x``, a projection.

    Args:
        graph: The graph; it is changed.
    """
    for node in list(graph.nodes):
        alpha = node.kwargs.get("alpha", 1)
        if node.target not in (_ADD, _SUB, _RSUB) or not all(isinstance(arg, Node) for arg in node.args):
            continue
        x, f = node.args[::-1] if node.target is _RSUB else node.args
        if node.target is _ADD and alpha != 1:
            replace(node, insert(node, _ADD, x, _multiple(node, f, alpha)))
        elif node.target is not _ADD and is_alike(x, node) and source_of_branch(x, f) is not None:
            replace(node, insert(node, _ADD, x, _multiple(node, f, -alpha)))


def _multiple(node: Node, value: Node, number: Argument) -> Node:
    """A value times a number, inserted before a node where it is not the value itself."""
    if number == 1:
        return value
    return insert(node, _ATEN.neg.default, value) if number == -1 else insert(node, _MUL, value, number)

"""Interpolations between x and what is computed from it, written as ``x + gate * (new - x)``.

A highway layer (Srivastava, Greff and Schmidhuber 2015, equation 3) is a block with an identity skip and a gated
branch: without its branch it leaves x, as it does with its transform gate closed.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from resnet_paths.unraveling.graphs import between, insert, is_alike, replace
from resnet_paths.unraveling.rewrites.branches import source_of_branch

__all__ = ["write_interpolations"]

_ADD, _SUB, _MUL = torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.mul.Tensor
_RSUB = torch.ops.aten.rsub.Scalar
_LERP = {torch.ops.aten.lerp.Scalar, torch.ops.aten.lerp.Tensor}


def write_interpolations(graph: Graph) -> None:
    """Write ``gate * new + (1 - gate) * x`` and ``torch.lerp(x, new, gate)`` as ``x + gate * (new - x)``.

    The forms differ by rounding.

    Args:
        graph: The graph; it is changed.
    """
    for node in list(graph.nodes):
        found = _lerp(node) if node.target in _LERP else _gated_sum(node)
        if found is not None:
            gate, new, x = found
            branch = insert(node, _MUL, insert(node, _SUB, new, x), gate)
            replace(node, insert(node, _ADD, x, branch))


def _lerp(node: Node) -> tuple[Argument, Node, Node] | None:
    """(Gate, new value, x) of ``torch.lerp``; the gate may be a number."""
    start, end, weight = node.args
    if not is_alike(start, node) or not is_alike(end, node):
        return None
    if source_of_branch(start, end) is not None:
        return weight, end, start
    if source_of_branch(end, start) is not None:
        return insert(node, _RSUB, weight, 1) if isinstance(weight, Node) else 1 - weight, start, end  # type: ignore[operator]
    return None


def _gated_sum(node: Node) -> tuple[Node, Node, Node] | None:
    """(Gate, new value, x) of ``gate * new + (1 - gate) * x``, where gate and new value are computed from x."""
    products = [arg for arg in node.args if isinstance(arg, Node) and arg.target is _MUL]
    if node.target is not _ADD or node.kwargs or len(node.args) != 2 or len(products) != 2:
        return None
    factors = [[f for f in product.args if isinstance(f, Node)] for product in products]
    if any(len(pair) != 2 for pair in factors):
        return None
    for one, other in (factors, factors[::-1]):
        for gate, new in (one, one[::-1]):
            for complement, x in (other, other[::-1]):
                if not _is_one_minus(complement, gate) or not is_alike(new, x):
                    continue
                if between(x, new) and between(x, gate):
                    return gate, new, x
                if between(new, x) and between(new, gate):
                    return complement, x, new
    return None


def _is_one_minus(node: Node, gate: Node) -> bool:
    if node.target is _RSUB:
        return node.args[0] is gate and all(_is_one(number) for number in node.args[1:])
    return node.target is _SUB and _is_one(node.args[0]) and node.args[1] is gate and not node.kwargs


def _is_one(argument: object) -> bool:
    return isinstance(argument, int | float) and argument == 1

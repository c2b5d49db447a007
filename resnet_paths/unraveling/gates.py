"""Gated skips written as residual blocks: ``T * H + (1 - T) * x`` is ``x + T * (H - x)``.

A highway layer (Srivastava, Greff and Schmidhuber 2015, equation 3) is a block with an identity skip and a gated
branch: without its branch it leaves x, as it does with its transform gate closed. The two forms differ by rounding.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

__all__ = ["write_gates_as_branches"]

_ADD, _SUB, _MUL = torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.mul.Tensor
_RSUB = torch.ops.aten.rsub.Scalar


def write_gates_as_branches(graph: Graph) -> None:
    """Rewrite every interpolation between a value and what is computed from it, in place.

    Args:
        graph: A flat graph of ATen operations.
    """
    for node in list(graph.nodes):
        found = _interpolation(node)
        if found is None:
            continue
        gate, new, carried = found
        with graph.inserting_before(node):
            difference = graph.call_function(_SUB, (new, carried))
            gated = graph.call_function(_MUL, (gate, difference))
            total = graph.call_function(_ADD, (carried, gated))
        for made in (difference, gated, total):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        for old in (node, *node.all_input_nodes):
            if not old.users:
                graph.erase_node(old)


def _interpolation(node: Node) -> tuple[Node, Node, Node] | None:
    """(Gate, new value, carried value) of ``gate * new + (1 - gate) * carried``, where new comes from carried."""
    products = [arg for arg in node.args if isinstance(arg, Node) and arg.target is _MUL]
    if node.target is not _ADD or node.kwargs or len(node.args) != 2 or len(products) != 2:
        return None
    factors = [[f for f in product.args if isinstance(f, Node)] for product in products]
    if any(len(pair) != 2 for pair in factors):
        return None
    for one, other in (factors, factors[::-1]):
        for gate, new in (one, one[::-1]):
            for complement, carried in (other, other[::-1]):
                if not _is_one_minus(complement, gate):
                    continue
                if new.meta["val"].shape != carried.meta["val"].shape:
                    continue
                if _comes_from(new, carried) and _comes_from(gate, carried):
                    return gate, new, carried
                if _comes_from(carried, new) and _comes_from(gate, new):
                    return complement, carried, new
    return None


def _is_one_minus(node: Node, gate: Node) -> bool:
    if node.target is _RSUB:
        return node.args[0] is gate and all(_is_one(number) for number in node.args[1:])
    return node.target is _SUB and _is_one(node.args[0]) and node.args[1] is gate and not node.kwargs


def _is_one(argument: object) -> bool:
    return isinstance(argument, int | float) and argument == 1


def _comes_from(node: Node, source: Node) -> bool:
    seen, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one is source:
            return True
        if one not in seen:
            seen.add(one)
            waiting.extend(one.all_input_nodes)
    return False

"""Low-rank adapters (LoRA, Hu et al. 2021) as parts of the layers that they adapt.

An adapted layer computes ``base(x) + scale * B(A(x))``: one linear map, of which the second summand has a low rank. Its
addition joins no branch to a skip, so that a network with adapters has the blocks of the network without.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch.fx import Node

from resnet_paths.unraveling.tracing import Trace

__all__ = ["keep_adapters_in_layers"]

_ATEN = torch.ops.aten
_LINEAR = {_ATEN.linear.default, _ATEN.addmm.default, _ATEN.mm.default, _ATEN.conv1d.default, _ATEN.conv2d.default}
# What keeps a map linear: factors, casts, other shapes, dropout in eval mode.
_AROUND = {
    _ATEN.mul.Tensor,
    _ATEN.div.Tensor,
    _ATEN.dropout.default,
    _ATEN.clone.default,
    _ATEN._to_copy.default,
    _ATEN.to.dtype,
    _ATEN.reshape.default,
    _ATEN.view.default,
}


def keep_adapters_in_layers(traced: Trace) -> Trace:
    """Write the sum of a layer and its low-rank adapter as one operation that is not the merge of a block.

    Args:
        traced: The graph of a network; changed in place.

    Returns:
        The graph, whose values are the same.
    """
    for node in traced.graph.nodes:
        if node.target is not _ATEN.add.Tensor or node.kwargs or len(traced.dependent_inputs(node)) != 2:
            continue
        lines = [_linear_maps(traced, operand) for operand in traced.dependent_inputs(node)]
        if any(_are_layer_and_adapter(traced, *pair) for pair in itertools.permutations(lines)):
            node.target = operator.add
    return traced


def _are_layer_and_adapter(traced: Trace, base: list[Node], adapter: list[Node]) -> bool:
    """Whether two lines of linear layers, last to first, are a layer and an adapter of low rank with the same input."""
    if not base or len(adapter) < 2 or base[0] in adapter or _source(traced, base[:1]) is not _source(traced, adapter):
        return False
    last, first = adapter
    return _width(first) <= min(_width(last), _width(base[0]))


def _linear_maps(traced: Trace, node: Node) -> list[Node]:
    """The linear layers from a value back to where something else than linear maps begins; at most two."""
    found: list[Node] = []
    while len(found) < 2:
        before = traced.dependent_inputs(node)
        if len(before) != 1 or node.target not in _LINEAR | _AROUND:
            break
        if node.target in _LINEAR:
            found.append(node)
        (node,) = before
    return found


def _source(traced: Trace, line: list[Node]) -> Node:
    """What the first of some linear layers reads."""
    (node,) = traced.dependent_inputs(line[-1])
    while node.target in _AROUND and len(traced.dependent_inputs(node)) == 1:
        (node,) = traced.dependent_inputs(node)
    return node


def _width(node: Node) -> int:
    """Number of features that a linear layer makes."""
    dim = 1 if node.target in (_ATEN.conv1d.default, _ATEN.conv2d.default) else -1
    return int(node.meta["val"].shape[dim])

"""Concatenations as blocks: branches side by side, each placed into its own channels of a wider space.

- ``cat(x, f(x))``, a layer of a DenseNet: x is the skip.
- ``cat(a(x), b(x), c(x))``, an Inception module: alternatives without a skip; pooling without weights is one.
- ``cat(left half of x, f(right half))``, a ShuffleNet unit: the half that is carried over is the skip.

A concatenation of mere slices (the patch merging of Swin) or with a constant (a class token) is no block, and neither
is one that puts a convolution in groups together again (MixNet): they are inside a segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from resnet_paths.core.weight_layers import is_weighted
from resnet_paths.unraveling.graphs import dimension
from resnet_paths.unraveling.tracing import Trace

__all__ = [
    "are_apart",
    "concatenated",
    "dimension",
    "is_in_groups",
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

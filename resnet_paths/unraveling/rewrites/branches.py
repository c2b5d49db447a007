"""What the rewrites of additions look for: branches, and the skips that they are added to."""

from __future__ import annotations

import torch
from torch.fx import Node

from resnet_paths.core.weight_layers import makes_branch
from resnet_paths.unraveling.graphs import between, is_shape

__all__ = ["KEEPING_ORDER", "PERMUTING", "rearranges", "source_of_branch"]

_ATEN = torch.ops.aten
KEEPING_ORDER = {
    _ATEN.reshape.default,
    _ATEN.flatten.using_ints,
    _ATEN.unflatten.int,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.alias.default,
    _ATEN.clone.default,
    _ATEN.contiguous.default,
    _ATEN.to.dtype,
    _ATEN.to.dtype_layout,
    _ATEN._to_copy.default,
}
"""Operations that keep all entries in their order, if the dtype stays the same; the shape may change."""

PERMUTING = {
    _ATEN.permute.default,
    _ATEN.transpose.int,
    _ATEN.t.default,
    _ATEN.numpy_T.default,
    _ATEN.mT.default,
    _ATEN.movedim.int,
    _ATEN.movedim.intlist,
    _ATEN.moveaxis.int,
    _ATEN.moveaxis.intlist,
    _ATEN.swapaxes.default,
    _ATEN.swapdims.default,
}
"""Operations that permute dimensions."""


def rearranges(node: Node) -> bool:
    """Whether a node holds the entries of its operand in another order, shape or place in memory, and their gradient.

    Args:
        node: The node.

    Returns:
        Whether it does; a change of dtype or device is no rearrangement.
    """
    if node.target not in KEEPING_ORDER and node.target not in PERMUTING:
        return False
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return bool(before.dtype is after.dtype and before.device == after.device)


def source_of_branch(added_to: Node, added: Node) -> Node | None:
    """What a branch is computed from, if it is one.

    Args:
        added_to: The value that it is added to. It may be a sum itself, of a skip and another branch; what it
            rearranges or detaches counts as well.
        added: The value that may be a branch.

    Returns:
        The value in `added_to` from which `added` is computed through a weight layer or pooling, as a branch is; None
        if there is none.
    """
    candidates = [added_to]
    for value in candidates:
        # A sum that others read as well is the end of an earlier block.
        is_partial_sum = value.target is _ATEN.add.Tensor and len(value.users) == 1
        if is_partial_sum or rearranges(value) or value.target is _ATEN.detach.default:
            candidates += [node for node in value.all_input_nodes if not is_shape(node)]
    found = (x for x in candidates if any(makes_branch(node) for node in between(x, added)))
    return next(found, None)

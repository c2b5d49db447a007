"""The exporter's operations written as those that the model runs, or that run on tensors of any layout."""

from __future__ import annotations

import torch
from torch.fx import Graph

from resnet_paths.unraveling.graphs import insert, replace

__all__ = ["restore_batch_norm", "write_copies_as_expansions", "write_views_as_reshapes"]

_ATEN = torch.ops.aten
_VIEWS = {_ATEN.view.default, _ATEN._unsafe_view.default}


def restore_batch_norm(graph: Graph) -> None:
    """Write batch normalisation in eval mode as the operation that the model runs.

    Its kernels, bits and derivative are then those of the model on every device.

    Args:
        graph: The graph; it is changed.
    """
    for node in list(graph.nodes):
        if node.target is not _ATEN._native_batch_norm_legit_no_training.default:
            continue
        *tensors, momentum, eps = node.args
        for item in list(node.users):
            use_cudnn = torch.backends.cudnn.enabled
            replace(item, insert(item, _ATEN.batch_norm.default, *tensors, False, momentum, eps, use_cudnn))


def write_views_as_reshapes(graph: Graph) -> None:
    """Write views as reshapes: the same values, for tensors of any layout.

    Images with their channels last cannot be viewed as vectors.

    Args:
        graph: The graph; it is changed.
    """
    for node in graph.nodes:
        if node.target in _VIEWS:
            node.target = _ATEN.reshape.default


def write_copies_as_expansions(graph: Graph) -> None:
    """Write ``copy(x, y)``, which has y's values in x's shape and dtype, as operations that have a derivative.

    Args:
        graph: The graph; it is changed.
    """
    for node in list(graph.nodes):
        if node.target is _ATEN.copy.default:
            like, values = node.args[:2]
            if values.meta["val"].dtype is not like.meta["val"].dtype:
                values = insert(node, _ATEN._to_copy.default, values, dtype=like.meta["val"].dtype)
            replace(node, insert(node, _ATEN.expand_as.default, values, like))

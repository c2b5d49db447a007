"""Where a model's code chooses a floating dtype, as many norms and rotary embeddings do: ``x.to(torch.float32)``.

An exported graph holds the dtypes of the run that was exported. In the graph of a float32 model a cast to float32 that
the code asks for, and the one back to the dtype of the input, both do nothing and cannot be distinguished; in that of a
bfloat16 model they can.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

__all__ = ["casts_of"]

_ATEN = torch.ops.aten
_MADE = {_ATEN.arange.start_step, _ATEN.arange.start, _ATEN.arange.default, _ATEN.linspace.default}
_NO_CAST = {_ATEN._assert_tensor_metadata.default, _ATEN.to.dtype_layout}  # the latter is x.to(device)


def casts_of(graph: Graph) -> list[Node]:
    """The operations of a graph, before it is rewritten, that are given a floating dtype.

    Args:
        graph: What `torch.export.export` makes.

    Returns:
        Their nodes, in order.
    """
    return [node for node in graph.nodes if _has_dtype(node)]


def _has_dtype(node: Node) -> bool:
    # A cast of a tensor, or an operation with a dtype; tensors of zeros or ones are exact in any.
    if node.op != "call_function" or node.target in _NO_CAST:
        return False
    if node.target not in _MADE and not (node.args and isinstance(node.args[0], Node)):
        return False
    names = (*node.args, *node.kwargs.values())
    return "new_" not in str(node.target) and any(isinstance(v, torch.dtype) and v.is_floating_point for v in names)

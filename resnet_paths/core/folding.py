"""BatchNorm in eval mode folded into the convolution before it: one operation less, the same map up to rounding.

With the running statistics m, v and the scale and shift a, b, BatchNorm of a convolution is a convolution again:

    a (W * x + c - m) / sqrt(v + eps) + b  =  (s W) * x + s (c - m) + b    with  s = a / sqrt(v + eps)

In a pre-activation block that is the second BatchNorm, in a post-activation block all of them. A BatchNorm
directly after an addition or before a nonlinearity has no convolution to be folded into, and is kept.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from resnet_paths._utils.devices import wide
from resnet_paths.core.weight_layers import CONVOLUTIONS

__all__ = ["fold_batchnorm"]


def fold_batchnorm(module: GraphModule) -> int:
    """Fold in place, in an exported graph, each BatchNorm whose input is a convolution that nothing else reads.

    The arithmetic is in float64, and the new weights are in the precision of the old ones. Tensors that others share
    are not changed: new ones are made.

    Args:
        module: An exported graph in eval mode.

    Returns:
        How many were folded.
    """
    num_folded = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.batch_norm.default:
            num_folded += _folded(module, node, f"folded{num_folded}")
    if num_folded:
        module.graph.eliminate_dead_code()
        module.recompile()
    return num_folded


def _folded(module: GraphModule, norm: Node, name: str) -> bool:
    """Fold one BatchNorm, its new tensors under `name`; whether that was possible."""
    convolution, *held = norm.args[:5]
    if norm.args[5] or not isinstance(convolution, Node) or convolution.target not in CONVOLUTIONS:
        return False  # it takes the batch's own statistics, or follows something else
    x, *parts = convolution.args
    parts, others = [*parts[:2], None][:2], parts[2:]
    if len(convolution.users) > 1 or not all(map(_is_held, [*parts, *held])) or None in held[2:]:
        return False
    kernel, *numbers = (_tensor(module, part) for part in (*parts, *held))
    assert kernel is not None  # a convolution has weights
    shift, scale, offset, mean, variance = (0 if number is None else wide(number) for number in numbers)
    factor = (variance + norm.args[7]).rsqrt() * (1 if held[0] is None else scale)  # type: ignore[operator, union-attr]
    folded = {
        "weight": wide(kernel) * factor.view(-1, *[1] * (kernel.dim() - 1)),
        "bias": offset + factor * (shift - mean),
    }
    graph, new_parts = module.graph, []
    with graph.inserting_before(norm):
        for kind, value in folded.items():
            module.register_parameter(f"{name}_{kind}", nn.Parameter(value.to(kernel), requires_grad=False))
            new_parts.append(graph.get_attr(f"{name}_{kind}"))
        new = graph.call_function(convolution.target, (x, *new_parts, *others), convolution.kwargs)
    norm.replace_all_uses_with(new, propagate_meta=True)
    graph.erase_node(norm)
    return True


def _is_held(part: Argument) -> bool:
    return part is None or (isinstance(part, Node) and part.op == "get_attr")


def _tensor(module: GraphModule, part: Argument) -> torch.Tensor | None:
    """The tensor that a graph reads from its module."""
    if not isinstance(part, Node):
        return None
    return cast("torch.Tensor", operator.attrgetter(str(part.target))(module).detach())

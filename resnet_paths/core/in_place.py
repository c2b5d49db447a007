"""Parts written by hand may work in place, as ``nn.ReLU(inplace=True)`` does: which ones are known not to."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.fx import GraphModule, Node

__all__ = ["keeps_its_input"]

# What is defined there writes over nothing, and calls its parts by `call_part`, except for the stem of a chain.
_OURS = ("resnet_paths.core.chain", "resnet_paths.core.parts")
# operator.iadd and its like
_IN_PLACE = {getattr(operator, f"i{name.strip('_')}", None) for name in dir(operator)}


def keeps_its_input(part: nn.Module) -> bool:
    """Whether a part is known to leave its input as it was.

    Args:
        part: A part of a chain.

    Returns:
        True where it is an exported graph without operations in place, or made of torch's own modules; False where it
        works in place, has hooks, or is of a class whose code is not known.
    """
    if part._forward_hooks or part._forward_pre_hooks:
        return False
    if isinstance(part, GraphModule):
        if "computes_only" not in part.meta:  # looked at once: a chain asks for each part in each forward pass
            part.meta["computes_only"] = all(map(_computes_only, part.graph.nodes))
        return bool(part.meta["computes_only"])
    kind = type(part)
    if kind is nn.Identity or kind.__module__ in _OURS:
        stem = getattr(part, "stem", None)
        return stem is None or keeps_its_input(stem)
    of_torch = kind.__module__.startswith("torch.nn.modules.") and not getattr(part, "inplace", False)
    return of_torch and all(map(keeps_its_input, part.children()))


def _computes_only(node: Node) -> bool:
    target: object = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable
    if node.op == "call_function":
        return getattr(target, "__module__", "") in ("_operator", "math") and target not in _IN_PLACE
    return node.op not in ("call_method", "call_module")

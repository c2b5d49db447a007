"""A piece of an exported graph as a module, which can be moved and converted like any other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_aggregate, map_arg

__all__ = ["Segment"]


class Segment(GraphModule):
    """A piece of an exported graph as a module; it holds the operations of eval mode and knows no other.

    Some of these make tensors as they run, on a device and in a dtype that the graph names. Both follow where the
    module's own tensors are moved or converted to.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Segment:
        """What every way to move or convert a module comes down to."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        move_constants(self, fn)
        return self


def move_constants(segment: Segment, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let the tensors that a graph makes as it runs be made where, and as what, a function takes tensors.

    Args:
        segment: The piece of a graph; changed in place.
        fn: Moves or converts a tensor.
    """

    def replaced(value: Argument) -> Argument:
        if isinstance(value, torch.device):
            return fn(torch.empty(0, device=value)).device
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return fn(torch.empty(0, dtype=value)).dtype
        return value

    default = torch.get_default_dtype()
    changed = False
    for node in segment.graph.nodes:
        args, kwargs = map_aggregate(node.args, replaced), map_aggregate(node.kwargs, replaced)
        if replaced(default) != default and _makes_numbers_of_default_dtype(node):
            kwargs = {**kwargs, "dtype": replaced(default)}
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs = args, kwargs
            changed = True
    if changed:
        segment.recompile()


def _makes_numbers_of_default_dtype(node: Node) -> bool:
    """Whether a node makes floating-point numbers out of nothing, as ``torch.zeros`` does, and names no dtype."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    of_tensors = any("Tensor" in str(argument.type) for argument in arguments)
    if of_tensors or not any(argument.name == "dtype" for argument in arguments):
        return False
    if node.kwargs.get("dtype") is not None:
        return False
    for size in (1, 10_000):  # for sizes that are known when it runs; a range must not end before it begins
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda _: size)  # noqa: B023 - used at once
        with contextlib.suppress(RuntimeError):
            return bool(node.target(*args, **kwargs | {"device": torch.device("meta")}).is_floating_point())
    return False

"""Fingerprints: short hashes of tensors, exported graphs and plain values, the same on any machine.

Results on disk are found again by them, so that those of another model, or of other images, are never mixed in. Of a
module that was not exported the code cannot be hashed: its class, plain attributes and tensors are, and `is_determined`
says whether more is needed, such as what it computes on some inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule
from torch.fx.node import map_arg

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["bytes_of", "fingerprint", "is_determined"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, torch.Size)
_NAMED = (torch.dtype, torch.memory_format, torch.layout)
# What `nn.Module.__init__` sets: parameters, buffers and modules are hashed, the rest does not compute.
_BOOKKEEPING = frozenset(vars(nn.Module()))


def fingerprint(*values: object, known: dict[int, bytes] | None = None) -> str:
    """SHA-256 of values; names and addresses do not count.

    Tensors and arrays count by dtype, shape and values, whatever their device. Exported graphs count by their
    operations and tensors, other modules by class, plain attributes, tensors and submodules. Sequences and mappings
    count by what they hold, in order.

    Args:
        *values: Plain values, tensors, arrays, modules, and tuples, lists and mappings of such.
        known: Digests of modules that were taken before, by `id`; filled here. Pass it while the modules live and do
            not change.

    Returns:
        64 hexadecimal digits.

    Raises:
        ResnetPathsError: If a value is of another kind.

    Example:
        >>> fingerprint(torch.ones(2)) == fingerprint(torch.ones(2)) != fingerprint(torch.ones(2).double())
        True
    """
    return _digest(values, {} if known is None else known).hex()


def is_determined(module: nn.Module, is_ours: Callable[[nn.Module], bool] = lambda _: False) -> bool:
    """Whether the fingerprint of a module says all that it computes.

    Args:
        module: The module.
        is_ours: Which modules are known to compute nothing but what their submodules and plain attributes say.

    Returns:
        Whether it and all its submodules are graphs of torch's own operations, or such modules, and none has hooks.
    """
    if module._forward_hooks or module._forward_pre_hooks or nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    if isinstance(module, GraphModule):
        return all(
            node.op in ("placeholder", "get_attr", "output")
            or isinstance(node.target, torch._ops.OpOverload)
            or getattr(node.target, "__module__", "") in ("_operator", "math")
            for node in module.graph.nodes
        )
    of_torch = type(module) in (nn.Identity, nn.ModuleList)
    return (of_torch or is_ours(module)) and all(is_determined(child, is_ours) for child in module.children())


def _digest(value: object, known: dict[int, bytes]) -> bytes:
    """32 bytes that stand for the value."""
    if isinstance(value, torch.Tensor):
        return _hash("tensor", str(value.dtype), tuple(value.shape), bytes_of(value))
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return _hash("array", str(value.dtype), value.shape, np.ascontiguousarray(value).tobytes())
    if isinstance(value, _PLAIN):
        return _hash(type(value).__name__, value)
    if isinstance(value, nn.Module):
        if id(value) not in known:
            known[id(value)] = _hash(*(_digest(part, known) for part in _parts_of_module(value)))
        return known[id(value)]
    if isinstance(value, Mapping):
        return _hash("mapping", *(_digest(part, known) for item in value.items() for part in item))
    if isinstance(value, tuple | list):
        return _hash("tuple" if isinstance(value, tuple) else "list", *(_digest(part, known) for part in value))
    if isinstance(value, _NAMED):
        return _hash(str(value))
    if isinstance(value, torch.device):
        return _hash("device")  # the same thing is computed on all
    if callable(value):  # an operation of a graph
        return _hash("function", getattr(value, "__module__", ""), str(getattr(value, "__qualname__", value)))
    raise ResnetPathsError("value", value, "numbers, strings, tensors, modules, and collections of such")


def _parts_of_module(module: nn.Module) -> list[object]:
    held = [dict(module._parameters), dict(module._buffers), dict(module._modules)]
    if isinstance(module, torch.jit.ScriptModule):
        return [str(module.inlined_graph), dict(module.named_parameters()), dict(module.named_buffers())]
    if isinstance(module, GraphModule):
        return ["graph", _operations_of(module.graph), *held]
    attributes = {k: v for k, v in sorted(vars(module).items()) if k not in _BOOKKEEPING and _is_plain(v)}
    return [f"{type(module).__module__}.{type(module).__qualname__}", attributes, *held]


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple | list) else isinstance(value, (*_PLAIN, *_NAMED))


def _operations_of(graph: Graph) -> list[object]:
    """What a graph does in each step, without the names of its nodes: those change when it is pickled."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            None if node.op == "placeholder" else node.target,
            map_arg((node.args, node.kwargs), lambda read: ("step", numbers[read])),
        )
        for node in graph.nodes
    ]


def _hash(*parts: object) -> bytes:
    """Each part is hashed after its length, so that no two lists of parts give the same bytes."""
    digest = hashlib.sha256()
    for value in parts:
        part = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The values of a tensor in the order of its indices, on any device; nothing of one without values."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_meta or not tensor.numel() or isinstance(tensor, FakeTensor):
        return b""
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

"""Fingerprints: hashes that are equal for modules and tensors with equal values, code and structure, on any machine.

They identify stored results, so that results of other models or images are never mixed. If equality cannot be
determined, such as for two functions with different code, fingerprints differ, and results are computed again.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import hashlib
import types
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.node import map_arg

__all__ = ["fingerprint"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, PurePath, Enum, range, slice, torch.Size)
_NAMED_IN_TORCH = (torch.dtype, torch.memory_format, torch.layout)
_NAMED = (type, types.ModuleType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)

# Attributes set by `nn.Module.__init__`: parameters, buffers, modules and hooks are hashed, others have no effect.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


def fingerprint(*values: Any, known: dict[int, bytes] | None = None) -> str:
    """SHA-256 over everything that a result depends on: values, code and structure, but not names or addresses.

    Tensors are hashed by dtype, shape and values, independent of their device. Modules are hashed by their class and
    its methods, parameters, buffers, attributes, hooks and submodules; exported graphs by their operations. Functions
    are hashed by code, defaults and closure, and by the functions and constants of the same file that they use. Other
    objects are hashed by their class and their pickled state. Objects of torch are hashed by name.

    Args:
        values: Any objects: numbers, strings, containers, tensors, modules, functions.
        known: Cache of digests of modules by `id`, filled here; valid as long as the modules exist and do not
            change.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> fingerprint(torch.ones(2)) == fingerprint(torch.ones(2)) != fingerprint(torch.ones(2).double())
        True
    """
    return _Walk({} if known is None else known).digest(values).hex()


class _Walk:
    """Recursive hashing of values, each once; values may contain themselves."""

    def __init__(self, known: dict[int, bytes]) -> None:
        self.known = known
        self.seen: dict[int, tuple[Any, bytes, int]] = {}  # with the value itself, so that its id is not reused
        self.open: dict[int, int] = {}  # values that are being hashed, with their depths
        self.reached = 0  # the minimum depth of an open value that occurred again

    def digest(self, value: Any) -> bytes:
        """Digest of a value, 32 bytes."""
        at_once = _at_once(value)
        if at_once is not None:
            return at_once
        key = id(value)
        if key in self.known:
            return self.known[key]
        if key in self.seen:
            _, found, reached = self.seen[key]
            self.reached = min(self.reached, reached)
            return found
        depth = len(self.open)
        if key in self.open:
            self.reached = min(self.reached, self.open[key])
            return _hash("again", depth - self.open[key])
        above, self.reached, self.open[key] = self.reached, depth, depth
        try:
            found = _hash(*self._inside(value))
        finally:
            del self.open[key]
        if self.reached >= depth and isinstance(value, nn.Module):  # otherwise it depends on the enclosing values
            self.known[key] = found
        self.seen[key] = value, found, self.reached
        self.reached = min(above, self.reached)
        return found

    def _inside(self, value: Any) -> list[Any]:
        """Parts of a value, each as bytes or as a plain value."""
        if isinstance(value, nn.Module):
            return ["module", *map(self.digest, _parts_of_module(value))]
        kind = _name_of(type(value))
        if isinstance(value, set | frozenset):
            return [kind, *sorted(map(self.digest, value))]
        if isinstance(value, Mapping):  # in order, since an OrderedDict of modules is called in order
            return [kind, *(self.digest(part) for item in value.items() for part in item)]
        if isinstance(value, tuple | list):
            return [kind, *map(self.digest, value)]
        if isinstance(value, np.ndarray):  # of objects
            return [kind, value.shape, self.digest(value.tolist())]
        return [kind, *map(self.digest, _parts_of_object(value))]


def _at_once(value: Any) -> bytes | None:
    """Digest of a value without parts; None for other values."""
    if isinstance(value, torch.Tensor):
        return _hash("tensor", str(value.dtype), tuple(value.shape), _bytes_of(value))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _hash("array", str(value.dtype), value.shape, np.ascontiguousarray(value).tobytes())
    if isinstance(value, _PLAIN):
        return _hash(_name_of(type(value)), value)
    if isinstance(value, np.generic):
        return _hash(_name_of(type(value)), value.tobytes())
    if isinstance(value, _NAMED_IN_TORCH):
        return _hash(str(value))
    if isinstance(value, torch.device):
        return _hash("device")  # results do not depend on the device
    if isinstance(value, _NAMED) or (isinstance(value, types.FunctionType) and _is_of_torch(value)):
        return _hash("name", _name_of(value))
    return None


def _parts_of_module(module: nn.Module) -> list[Any]:
    hooks = [
        [(hook, key in with_kwargs) for key, hook in registered.items()]
        for registered, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        )
    ]
    if isinstance(module, torch.jit.ScriptModule):
        return [str(module.inlined_graph), dict(module.named_parameters()), dict(module.named_buffers())]
    held = [dict(module._parameters), dict(module._buffers), dict(module._modules), *hooks]
    if isinstance(module, GraphModule):
        return [_operations_of(module.graph), *held]
    kind = type(module)
    attributes = {name: value for name, value in sorted(vars(module).items()) if name not in _BOOKKEEPING}
    return [kind.__qualname__, _body_of(kind), attributes, *held]


def _operations_of(graph: Graph) -> list[Any]:
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


def _parts_of_object(value: Any) -> list[Any]:
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
        return [_name_of(value), value.__self__]
    if isinstance(value, types.FunctionType):
        return [_code_of(value), value.__defaults__, value.__kwdefaults__, _closed_over(value), _used_globals(value)]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset]
    try:
        reduce: Callable[[Any], Any] = copyreg.dispatch_table.get(type(value), _reduced)
        kept = reduce(value)
        if isinstance(kept, tuple):  # after the third entry there are iterators over items
            kept = [*kept[:3], *(list(items) for items in kept[3:] if items is not None)]
    except Exception:  # a lock, an open file...
        kept = getattr(value, "__dict__", None)
    return [_body_of(type(value)), kept]


def _reduced(value: Any) -> Any:
    return value.__reduce_ex__(4)


def _body_of(kind: type) -> list[Any]:
    """Methods and other attributes of a class and its parents, except those of torch."""
    return [
        (name, member)
        for parent in kind.__mro__
        if parent is not object and not _is_of_torch(parent)
        for name, member in sorted(vars(parent).items())
        if isinstance(member, types.FunctionType | staticmethod | classmethod | property)
        or not (name.startswith("__") or name == "_abc_impl" or isinstance(member, types.MemberDescriptorType))
    ]


def _code_of(function: types.FunctionType | types.CodeType, doc: str | None = None) -> tuple[Any, ...]:
    """What a function computes, independent of its position in a file and of its docstring."""
    if isinstance(function, types.FunctionType):
        return _code_of(function.__code__, function.__doc__)
    constants = [_code_of(c) if isinstance(c, types.CodeType) else c for c in function.co_consts]
    return function.co_code, function.co_names, [c for c in constants if c is not doc or c is None]


def _closed_over(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name without a value yet
            cells.append(cell.cell_contents)
    return cells


def _used_globals(function: types.FunctionType) -> dict[str, Any]:
    """Constants, modules and functions of the same file that a function uses; other names are part of its code."""
    found = {}
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for name in sorted({i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}):
            value = function.__globals__.get(name)
            written_here = isinstance(value, Callable) and getattr(value, "__module__", None) == function.__module__  # type: ignore[arg-type]
            if written_here or isinstance(value, (*_PLAIN, tuple, torch.Tensor, nn.Module)):
                found[name] = value
    return found


def _is_of_torch(value: Any) -> bool:
    return str(value.__module__).split(".")[0] == "torch"


def _name_of(value: Any) -> str:
    """Module and name of a class, a function, a module or an operator."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or str(value)
    return f"{getattr(value, '__module__', '')}.{name}"


def _hash(*parts: Any) -> bytes:
    """Hash each part after its length, so that different lists of parts give different bytes."""
    digest = hashlib.sha256()
    for value in parts:
        part = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_meta or not tensor.numel():
        return b""
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

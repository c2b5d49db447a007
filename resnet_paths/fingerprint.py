"""Fingerprints: short hashes that are equal for modules and tensors that compute the same thing, on any machine.

Results on disk are found again by them, so that those of another model, or of other images, are never mixed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import types
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

__all__ = ["fingerprint"]

# What `nn.Module.__init__` sets: parameters, buffers and modules are hashed by their values, the rest does not compute.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {
    "training", "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
}  # fmt: skip


def fingerprint(*values: Any, known: dict[int, str] | None = None) -> str:
    """SHA-256 over everything that a result can depend on: values, code and structure, not names or addresses.

    Tensors count by dtype, shape and values, wherever they lie. Modules count by their class and its `forward`, their
    parameters, buffers, attributes, hooks and submodules; exported graphs by their operations. What is of an unknown
    kind counts by its class and attributes.

    Args:
        values: Numbers, strings, containers, tensors, modules, functions.
        known: Fingerprints of modules that were taken before, by `id`; filled here. Pass it while the modules live
            and do not change.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> fingerprint(torch.ones(2)) == fingerprint(torch.ones(2)) != fingerprint(torch.ones(2).double())
        True
    """
    digest = hashlib.sha256()
    for part in _Walk({} if known is None else known).parts(values):
        digest.update(part)
    return digest.hexdigest()


class _Walk:
    """One walk over values; objects that are being looked at already are not looked at again."""

    def __init__(self, known: dict[int, str]) -> None:
        self.known = known
        self.inside: set[int] = set()

    def parts(self, value: Any) -> list[bytes]:
        """Bytes that stand for the value, each part after its length, so that no two values give the same ones."""
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, nn.Module):
            return _framed("module", self.of_module(value))
        if isinstance(value, torch.Tensor):
            return _framed("tensor", str(value.dtype), tuple(value.shape), _bytes_of(value))
        if isinstance(value, np.ndarray):
            return _framed("array", str(value.dtype), value.shape, np.ascontiguousarray(value).tobytes())
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | PurePath | Enum):
            return _framed(kind, value)
        if isinstance(value, np.generic):
            return _framed(kind, value.tobytes())
        if isinstance(value, torch.dtype | torch.memory_format | torch.layout | torch.Size | range | slice):
            return _framed(kind, value)
        if isinstance(value, torch.device):
            return _framed("device")  # the same thing is computed on all
        if isinstance(value, type | types.BuiltinFunctionType | torch._ops.OpOverload):
            return _framed("name", getattr(value, "__module__", ""), getattr(value, "__qualname__", str(value)))
        if id(value) in self.inside:
            return _framed("again")
        self.inside.add(id(value))
        try:
            return _framed(kind, *self._inner(value))
        finally:
            self.inside.discard(id(value))

    def _inner(self, value: Any) -> list[bytes]:
        if isinstance(value, Mapping):
            # In order: an OrderedDict of modules runs in its order.
            return [part for item in value.items() for part in self.parts(item)]
        if isinstance(value, set | frozenset):
            return sorted(b"".join(self.parts(item)) for item in value)
        if isinstance(value, tuple | list):
            return [part for item in value for part in self.parts(item)]
        if isinstance(value, partial):
            return self.parts((value.func, value.args, value.keywords))
        if isinstance(value, types.MethodType):
            return self.parts((value.__func__, value.__self__))
        if isinstance(value, types.FunctionType):
            return self.parts((_code_of(value), value.__defaults__, value.__kwdefaults__, _closed_over(value)))
        return self.parts(getattr(value, "__dict__", None))

    def of_module(self, module: nn.Module) -> str:
        if id(module) in self.known:
            return self.known[id(module)]
        if id(module) in self.inside:
            return "again"
        self.inside.add(id(module))
        kind = type(module)
        if isinstance(module, GraphModule):
            about: list[Any] = [module.code, dict(module.named_parameters()), dict(module.named_buffers())]
        else:
            about = [
                kind.__qualname__, _methods_of(kind), module.extra_repr(),
                module._parameters, module._buffers, module._modules,
                {k: v for k, v in sorted(vars(module).items()) if k not in _BOOKKEEPING},
            ]  # fmt: skip
        digest = hashlib.sha256()
        for part in self.parts(about):
            digest.update(part)
        self.inside.discard(id(module))
        self.known[id(module)] = digest.hexdigest()
        return self.known[id(module)]


def _framed(*values: Any) -> list[bytes]:
    found = []
    for value in values:
        part = value if isinstance(value, bytes) else repr(value).encode()
        found += [len(part).to_bytes(8, "little"), part]
    return found


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _methods_of(kind: type) -> list[Any]:
    """What the methods of a class do, those of its parents included; torch's own are known by their names."""
    own = [parent for parent in kind.__mro__ if not parent.__module__.startswith(("torch.", "builtins"))]
    return [
        (name, _code_of(method))
        for parent in own
        for name, method in sorted(vars(parent).items())
        if isinstance(method, types.FunctionType)
    ]


def _code_of(function: types.FunctionType | types.CodeType) -> tuple[Any, ...]:
    """What a function does, without where it stands in a file."""
    code = function if isinstance(function, types.CodeType) else function.__code__
    constants = [_code_of(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return code.co_code, code.co_names, constants


def _closed_over(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that has no value yet
            cells.append(cell.cell_contents)
    return cells

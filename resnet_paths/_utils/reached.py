"""A fingerprint of objects with the Python code that they lead to, to notice that a model is not the one it was.

From the classes of a model's modules it follows the functions, classes and values that their code names: methods,
helper functions, global constants, defaults, closures. Code is read from the functions as they are in memory, so that
a replaced method counts and a comment does not. Of installed packages, torch among them, the functions and methods so
found count by their own code; what they call in turn is left to the version of the package, and the standard library to
that of Python. What code reaches under names that it puts together as it runs is not seen, nor is what is written in
another language.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import platform
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import nn

from resnet_paths._utils.fingerprint import bytes_of

__all__ = ["fingerprint_with_code"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, torch.Size, type(...))
_NAMED = (torch.dtype, torch.memory_format, torch.layout, torch.device, np.dtype, PurePath)
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
_INSTALLED = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_OF_COMPILE = {"__init__", "__setstate__", "___needs_generation_tag_patch"}
"""What `torch.compile` replaces in `torch.nn.Module` as it first runs."""
_NOT_RUN = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl"}


def fingerprint_with_code(*values: object) -> str:
    """SHA-256 of values and of the Python code that they lead to.

    Parameters and buffers of modules count by shape, dtype and device, and by which of them are one tensor; other
    tensors and arrays by their values as well. Hooks do not count.

    Args:
        *values: Modules, functions, plain values, and whatever else a model holds.

    Returns:
        64 hexadecimal digits, the same in every process that runs the same code.
    """
    return _Reached().digest_of(values)


class _Reached:
    """What is reached from some values, each object once, in the order in which it is found."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []  # the id of an object that is gone may be that of another
        self._waiting: deque[object] = deque()
        self._names: dict[str, None] = {}  # all that the code reads, as globals or as attributes
        self._classes: list[tuple[type, dict[str, object]]] = []  # with those of their members that no code has named
        self._packages: set[str] = set()

    def digest_of(self, values: tuple[object, ...]) -> str:
        self._refer(values)
        while self._waiting:
            while self._waiting:
                self._describe(self._waiting.popleft())
            for _, members in self._classes:
                for name in [name for name in members if name in self._names]:
                    self._note("member", name)
                    self._refer(members.pop(name))
        self._note("python", platform.python_version())
        for package in sorted(self._packages):
            self._note(package, getattr(sys.modules.get(package), "__version__", ""))
        return self._digest.hexdigest()

    def _note(self, *parts: object) -> None:
        for part in parts:
            data = repr(part).encode()
            self._digest.update(len(data).to_bytes(8, "little") + data)

    def _refer(self, value: object) -> None:
        """Note a plain value, or the number of an object, which is described later."""
        if isinstance(value, enum.Enum):
            self._note("enum", type(value).__qualname__, value.name)
        elif isinstance(value, _PLAIN) and type(value).__module__ in ("builtins", "torch"):
            self._note(type(value).__name__, value)
        elif isinstance(value, _NAMED):
            self._note(str(value))
        elif id(value) in self._numbers:
            self._note("object", self._numbers[id(value)])
        else:
            self._numbers[id(value)] = len(self._numbers)
            self._kept.append(value)
            self._waiting.append(value)

    def _refer_all(self, kind: str, values: Iterable[object]) -> None:
        values = list(values)
        self._note(kind, len(values))
        for value in values:
            self._refer(value)

    def _describe(self, value: object) -> None:
        describe = next((found for kind, found in _KINDS if isinstance(value, kind)), _Reached._other)
        describe(self, value)

    def _tensor(self, tensor: torch.Tensor) -> None:
        self._note("tensor", str(tensor.dtype), tuple(tensor.shape), str(tensor.device))
        self._digest.update(bytes_of(tensor))

    def _array(self, array: np.ndarray) -> None:
        self._note("array", str(array.dtype), array.shape)
        if array.dtype.hasobject:
            self._refer_all("objects", array.reshape(-1).tolist())
        else:
            self._digest.update(np.ascontiguousarray(array).tobytes())

    def _module(self, module: nn.Module) -> None:
        self._refer(type(module))
        for table in ("_parameters", "_buffers"):
            for name, tensor in vars(module)[table].items():
                number = None if tensor is None else self._numbers.setdefault(id(tensor), len(self._numbers))
                form = () if tensor is None else (str(tensor.dtype), tuple(tensor.shape), str(tensor.device))
                self._note(table, name, number, form)
        self._mapping(module._modules)
        self._attributes({name: value for name, value in vars(module).items() if name not in _BOOKKEEPING})

    def _mapping(self, mapping: Mapping[str, object] | Mapping[object, object]) -> None:
        self._refer_all(type(mapping).__name__, [part for item in mapping.items() for part in item])

    def _sequence(self, values: Iterable[object]) -> None:
        self._refer_all(type(values).__name__, values)

    def _set(self, values: Iterable[object]) -> None:
        self._note("set", *sorted(repr(value) for value in values if isinstance(value, _PLAIN)))

    def _attributes(self, attributes: Mapping[str, object]) -> None:
        # A stored hash of an object differs between processes; the other attributes are compared.
        self._mapping({name: value for name, value in sorted(attributes.items()) if not name.endswith("_hash")})

    def _partial(self, value: functools.partial[object]) -> None:
        self._refer_all("partial", [value.func, value.args, value.keywords])

    def _method(self, value: MethodType) -> None:
        self._refer_all("method", [value.__func__, value.__self__])

    def _property(self, value: property) -> None:
        self._refer_all("property", [value.fget])

    def _wrapped(self, value: staticmethod | classmethod) -> None:  # type: ignore[type-arg]
        self._refer_all(type(value).__name__, [value.__func__])

    def _python_module(self, value: ModuleType) -> None:
        self._note("module", value.__name__)

    def _function(self, function: FunctionType) -> None:
        self._note("function", function.__module__, function.__qualname__)
        names = self._code(function.__code__)
        if self._is_installed(function.__module__):
            return
        self._refer_all("defaults", [function.__defaults__, function.__kwdefaults__])
        self._refer_all("closure", _contents(function))
        self._attributes(vars(function))
        self._names |= names
        self._refer_all("globals", _named(function.__globals__, names))

    def _code(self, code: CodeType) -> dict[str, None]:
        """Note what code does, without its place in a file; the names that it reads."""
        self._note("code", code.co_code, code.co_names, code.co_varnames[: code.co_argcount], code.co_flags)
        names = dict.fromkeys(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                names |= self._code(constant)
            elif isinstance(constant, frozenset):  # whose order differs between processes
                self._set(constant)
            else:
                self._note(constant)
                names |= dict.fromkeys([constant] if isinstance(constant, str) and constant.isidentifier() else [])
        return names

    def _class(self, kind: type) -> None:
        self._note("class", kind.__module__, kind.__qualname__)
        if _is_of_standard_library(kind.__module__):
            return
        members = {name: value for name, value in sorted(vars(kind).items()) if name not in _NOT_RUN}
        self._refer_all("bases", kind.__bases__)
        if self._is_installed(kind.__module__):
            for name, value in members.items():
                if name not in _OF_COMPILE and isinstance(
                    value, (*_PLAIN, FunctionType, property, classmethod, staticmethod)
                ):
                    self._note("member", name)
                    self._refer(value)
            return
        # What __init__ of a module has done shows in its attributes.
        always = [name for name in members if name.startswith("__") and name.endswith("__")]
        if issubclass(kind, nn.Module):
            always = [name for name in ("__call__", "__getattr__", "forward") if name in members]
        for name in always:
            self._note("member", name)
            self._refer(members.pop(name))
        self._classes.append((kind, members))

    def _is_installed(self, module: str | None) -> bool:
        """Whether code is of an installed package, whose version is noted, or of the standard library."""
        package = str(module).partition(".")[0]
        if _is_of_standard_library(package):
            return True
        file = getattr(sys.modules.get(package), "__file__", None) or ""
        if package != "torch" and not file.startswith(_INSTALLED):
            return False
        self._packages.add(package)
        return True

    def _other(self, value: object) -> None:
        self._refer(type(value))
        if isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):  # as functools.cache makes it
            self._refer(wrapped)
        elif not _is_of_standard_library(type(value).__module__):
            slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
            self._attributes({name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {}))
        else:
            self._note(getattr(value, "__name__", ""))


_KINDS: tuple[tuple[type | tuple[type, ...], Callable[[_Reached, object], None]], ...] = (
    (torch.Tensor, _Reached._tensor),
    ((np.ndarray, np.generic), lambda reached, value: reached._array(np.asarray(value))),
    (nn.Module, _Reached._module),
    (Mapping, _Reached._mapping),
    ((set, frozenset), _Reached._set),
    ((tuple, list, deque), _Reached._sequence),
    (functools.partial, _Reached._partial),
    (MethodType, _Reached._method),
    (property, _Reached._property),
    ((staticmethod, classmethod), _Reached._wrapped),
    (ModuleType, _Reached._python_module),
    (FunctionType, _Reached._function),
    (type, _Reached._class),
)  # type: ignore[assignment]


def _is_of_standard_library(module: str | None) -> bool:
    return str(module).partition(".")[0] in sys.stdlib_module_names - {"__main__"}


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _contents(function: FunctionType) -> Iterator[object]:
    """What a function reads of those around it."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # of a variable that was not assigned
            yield None


def _named(namespace: Mapping[str, object], names: Iterable[str]) -> Iterator[object]:
    """The objects that names of a function's code stand for, in its own file and in the modules that it names."""
    package = str(namespace.get("__package__") or "")
    modules: list[ModuleType] = []
    for name in names:
        imported = sys.modules.get(name) or sys.modules.get(f"{package}.{name}")  # by the function itself
        value = namespace.get(name, imported)
        if isinstance(value, ModuleType):
            modules.append(value)
        elif name in namespace:
            yield value
    seen: set[str] = set()
    while modules:
        module = modules.pop()
        if module.__name__ in seen or _is_of_standard_library(module.__name__):
            continue
        seen.add(module.__name__)
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, ModuleType):
                modules.append(value)
            elif value is not None:
                yield value

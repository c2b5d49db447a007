"""A chain as plain data, and back: operations by name, tensors by their names in the model.

What is written holds no code: an operation is looked up among those that torch has registered, or among the few
functions of numbers that sizes need, and names have to be identifiers. Tensors are those of the model at hand; only
what the model's forward makes itself, such as a table of numbers, is written with its values.
"""

from __future__ import annotations

import base64
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import nn
from torch.fx import Graph, Node
from torch.utils._sympy import functions as sizes_of_torch

from resnet_paths._utils.fingerprint import bytes_of
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.input_sizes import CheckedInputs, InputSizes
from resnet_paths.core.parts import BlockFields, Parallel
from resnet_paths.core.segments import Segment
from resnet_paths.core.signature import Signature

__all__ = ["Record", "Unwritable", "read_chain", "write_chain"]

Record: TypeAlias = Any
"""What JSON holds."""
_PARTS = ("branch", "skip", "pre", "post")
_FIELDS = [field for field in BlockFields.__annotations__ if field not in _PARTS]
_KINDS: dict[str, type] = {
    "dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout, "device": torch.device,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., object]] = {
    **{f"operator.{name}": getattr(operator, name) for name in operator.__all__ if hasattr(operator, f"__{name}__")},
    "operator.getitem": operator.getitem,
    **{f"math.{name}": getattr(math, name) for name in ("floor", "ceil", "trunc", "sqrt", "pow", "log2")},
    **{f"torch.{name}": getattr(torch, name) for name in dir(torch) if name.startswith("sym_")},
    **{f"builtins.{each.__name__}": each for each in (max, min, abs, pow, round, int, float, bool)},
}
_NAMES = {function: name for name, function in reversed(_FUNCTIONS.items())}
_OF_SYMPY = (
    *(sympy.Add, sympy.Mul, sympy.Pow, sympy.Max, sympy.Min, sympy.Mod, sympy.And, sympy.Or, sympy.Not),
    *(sympy.Eq, sympy.Ne, sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt),
)
_OF_TORCH = (each for each in vars(sizes_of_torch).values() if isinstance(each, type) and issubclass(each, sympy.Expr))
_EXPRESSIONS: dict[str, Record] = {kind.__name__: kind for kind in (*_OF_SYMPY, *_OF_TORCH)}


class Unwritable(Exception):  # noqa: N818 - no error: the chain is not kept
    """A chain holds something that cannot be written as plain data."""


def write_chain(chain: ResidualChain, model: nn.Module) -> Record:
    """A chain as plain data.

    Args:
        chain: A chain that was read from a model.
        model: The model; what is looked up in it by name is not written.

    Returns:
        Dictionaries, lists, strings and numbers.

    Raises:
        Unwritable: If it has a part, an operation or a value of a kind that is not known here.
    """
    constants: dict[str, Record] = {}
    return {"chain": _Writer(model, constants).module(chain), "constants": constants}


def read_chain(record: Record, model: nn.Module, signature: Signature | None) -> ResidualChain:
    """The chain that was written, with the tensors of a model.

    Args:
        record: From `write_chain`.
        model: The model, or another one of the same code and shapes.
        signature: How the chain is called; None for tensors in a row.

    Returns:
        The chain.

    Raises:
        Exception: Of any kind, if the record is not one that was written for such a model.
    """
    return _Reader(model, signature, record["constants"]).chain(record["chain"])


class _Writer:
    def __init__(self, model: nn.Module, constants: dict[str, Record]) -> None:
        self.model = model
        self.constants = constants

    def module(self, module: nn.Module | None) -> Record:
        if module is None:
            return None
        if type(module) is nn.Identity:
            return {"kind": "identity"}
        if isinstance(module, Segment):
            return {"kind": "segment", "nodes": self.nodes(module)}
        if isinstance(module, CheckedInputs):
            sizes = [[_expression(size) for size in shape] for shape in module.sizes.shapes]
            conditions = [_expression(condition) for condition in module.sizes.conditions]
            return {"kind": "stem", "of": self.module(module.module), "sizes": sizes, "conditions": conditions}
        if isinstance(module, Parallel):
            branches = [self.module(branch) for branch in module]
            return {"kind": "parallel", "of": branches, "onto_skip": module.onto_skip, "names": list(module.names)}
        if isinstance(module, ResidualChain):
            return {
                "kind": "chain",
                "stem": self.module(module.stem),
                "blocks": [self.block(block) for block in module],
                "head": self.module(module.head),
                "context_names": list(module.context_names),
                "notes": list(module.notes),
                "casts": list(module.casts),
            }
        raise Unwritable(f"a {type(module).__name__}")

    def block(self, block: Block) -> Record:
        parts = {name: self.module(getattr(block, name)) for name in _PARTS}
        return parts | {name: getattr(block, name) for name in _FIELDS}

    def nodes(self, segment: Segment) -> Record:
        numbers: dict[Node, int] = {}
        written = []
        for node in segment.graph.nodes:
            target = node.target
            if node.op == "get_attr":
                self.tensor(str(target), operator.attrgetter(str(target))(segment))
            elif node.op == "call_function":
                target = _name_of(target)
            written.append([node.op, node.name, target, _value(node.args, numbers), _value(dict(node.kwargs), numbers)])
            numbers[node] = len(numbers)
        return written

    def tensor(self, name: str, tensor: torch.Tensor) -> None:
        try:
            found = operator.attrgetter(name)(self.model)
        except AttributeError:
            if tensor.requires_grad or tensor.layout is not torch.strided or tensor.is_quantized:
                raise Unwritable(f"the tensor {name!r}, which the model does not have under this name") from None
            data = base64.b85encode(bytes_of(tensor)).decode()
            self.constants[name] = [_value(tensor.dtype, {}), list(tensor.shape), str(tensor.device), data]
        else:
            if found is not tensor:
                raise Unwritable(f"the tensor {name!r}, which the model makes again each time")


class _Reader:
    def __init__(self, model: nn.Module, signature: Signature | None, constants: Mapping[str, Record]) -> None:
        self.model = model
        self.signature = signature
        self.constants = {name: _constant(*written) for name, written in constants.items()}

    def module(self, record: Record) -> nn.Module | None:
        if record is None:
            return None
        kind = record["kind"]
        if kind == "identity":
            return nn.Identity().eval()
        if kind == "segment":
            return self.segment(record["nodes"])
        if kind == "stem":
            shapes = tuple(tuple(map(_sympified, shape)) for shape in record["sizes"])
            sizes = InputSizes(shapes, tuple(map(_sympified, record["conditions"])))
            return CheckedInputs(self.required(record["of"]), sizes, self.signature)
        if kind == "parallel":
            branches = [self.required(branch) for branch in record["of"]]
            return Parallel(branches, onto_skip=record["onto_skip"], names=record["names"])
        if kind == "chain":
            return self.chain(record)
        raise ValueError(f"a part of the kind {kind!r}")

    def required(self, record: Record) -> nn.Module:
        module = self.module(record)
        if module is None:
            raise ValueError("a part is missing")
        return module

    def chain(self, record: Record) -> ResidualChain:
        blocks = []
        for fields in record["blocks"]:
            parts = {name: self.module(fields[name]) for name in _PARTS}
            block = Block(**parts, **{name: fields[name] for name in _FIELDS})  # type: ignore[arg-type]
            block.training = False
            blocks.append(block)
        chain = ResidualChain(
            self.required(record["stem"]), blocks, self.required(record["head"]), record["context_names"]
        )
        chain.notes, chain.casts = tuple(record["notes"]), tuple(record["casts"])
        chain.training = chain.blocks.training = False
        chain.eval_only = True
        return chain

    def segment(self, written: Record) -> Segment:
        graph = Graph()
        nodes: list[Node] = []
        tensors: dict[str, torch.Tensor] = {}
        for op, name, target, args, kwargs in written:
            # Names become a part of the code that torch.fx writes.
            names = [name, *(kwargs if op == "call_function" else ()), *([target] if op == "placeholder" else [])]
            if not all(isinstance(each, str) and each.isidentifier() for each in names):
                raise ValueError(f"the names {names}")
            if op == "get_attr":
                tensors[target] = self.tensor(target)
            made = {key: _read(value, nodes) for key, value in kwargs.items()}
            called = _function(target) if op == "call_function" else target
            if op not in ("placeholder", "get_attr", "call_function", "output"):
                raise ValueError(f"a node of the kind {op!r}")
            nodes.append(graph.create_node(op, called, _read(args, nodes), made, name=name))
        return Segment(tensors, graph, class_name="Segment").eval()

    def tensor(self, name: str) -> torch.Tensor:
        if name in self.constants:
            return self.constants[name]
        tensor = operator.attrgetter(name)(self.model)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name!r} is no tensor")
        return tensor


def _name_of(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = _NAMES.get(target) if callable(target) else None
    if name is None:
        raise Unwritable(f"the operation {target}")
    return name


def _function(name: str) -> Callable[..., object]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, operation, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise TypeError(f"{name!r} is no operation of torch")
    return found


def _value(value: object, numbers: Mapping[Node, int]) -> Record:
    """An argument of an operation: what JSON has no form for becomes a dictionary with its kind."""
    if isinstance(value, Node):
        return {"node": numbers[value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple | list):
        items = [_value(item, numbers) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: _value(item, numbers) for key, item in value.items()}
    if isinstance(value, slice):
        return {"slice": [_value(item, numbers) for item in (value.start, value.stop, value.step)]}
    kind = next((name for name, kind in _KINDS.items() if isinstance(value, kind)), None)
    if kind is None:
        raise Unwritable(f"an argument that is a {type(value).__name__}")
    return {kind: str(value).removeprefix("torch.")}


def _read(value: Record, nodes: Sequence[Node]) -> Record:
    if isinstance(value, list):
        return [_read(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return nodes[held]
    if kind == "tuple":
        return tuple(_read(held, nodes))
    if kind == "slice":
        return slice(*_read(held, nodes))
    if kind == "device":
        return torch.device(held)
    made = getattr(torch, held)
    if not isinstance(made, _KINDS[kind]):
        raise TypeError(f"{held!r} is no {kind}")
    return made


def _constant(dtype: Record, shape: Sequence[int], device: str, data: str) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(base64.b85decode(data)), dtype=torch.uint8) if data else torch.empty(0)
    return flat.view(_read(dtype, [])).reshape(shape).to(device) if data else flat.to(_read(dtype, [])).reshape(shape)


def _expression(expr: sympy.Basic) -> Record:
    """A size, or a condition on sizes."""
    if expr.is_Symbol:
        return str(expr)
    if expr.is_Integer:
        return int(expr)
    if expr.is_Rational:
        return {"Rational": [int(expr.p), int(expr.q)]}
    name = type(expr).__name__
    if name not in _EXPRESSIONS:
        raise Unwritable(f"a size with {name}")
    return {name: [_expression(part) for part in expr.args]}


def _sympified(record: Record) -> Record:
    if isinstance(record, int):
        return sympy.Integer(record)
    if isinstance(record, str):
        return sympy.Symbol(record, integer=True, positive=True)
    ((name, parts),) = record.items()
    made = [_sympified(part) for part in parts]
    return sympy.Rational(*made) if name == "Rational" else _EXPRESSIONS[name](*made)

"""Operations linearized with their gates held: the usual reading of transformers, exact as the tangent is.

Every operation f is read as ``A x + c`` with an A that depends on x and is held at its value:

- normalisation (layer, group and RMS norm): the denominator is held; the mean that is subtracted is not;
- attention: the weights are held, so that the output is a linear map of the values;
- activations with f(0) = 0 (GELU, SiLU, Mish, hardswish, tanh, ELU and its relatives, powers): f(x) = x * gate(x) with
  gate(x) = f(x) / x held; ReLU and its leaky relatives are read so by their tangent already;
- products of two factors: the gate is held. The gate is the factor made by the operation that is highest in
  `_GATES`: denominators, then softmax and exponentials, sigmoids, erf and tanh, then other activations; scaling,
  rearranging and reducing it change nothing. Of two factors of one rank each takes half of the product (the
  uniform rule of Achtibat et al. 2024, https://arxiv.org/abs/2402.05602);
- quotients: the denominator is held.

All other operations that are not linear keep their tangent, and are named.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from resnet_paths._utils.errors import ResnetPathsError, nearest_names
from resnet_paths._utils.threads import ONE_TRACE
from resnet_paths.core.backward.linearize import Context, Pullback, linearize
from resnet_paths.core.backward.operations import Step, linearize_operation
from resnet_paths.core.backward.recursion import Linearizer
from resnet_paths.core.in_place import keeps_its_input
from resnet_paths.core.input_sizes import CheckedInputs
from resnet_paths.core.parts import context_read_by
from resnet_paths.core.segments import Segment

__all__ = ["LINEARIZATIONS", "Detached", "linearizer_of"]

LINEARIZATIONS = ("tangent", "detached")
"""Names of linearizations."""

aten = torch.ops.aten

_GATES = (
    {"rsqrt", "sqrt", "reciprocal", "linalg_vector_norm", "norm", "var", "std"},
    {"softmax", "_softmax", "exp"},
    {"sigmoid", "hardsigmoid", "hardtanh", "relu6"},
    {"erf", "tanh"},
    {"silu", "gelu", "mish", "hardswish", "relu", "elu", "leaky_relu"},
)
_SECANTS = {"gelu", "silu", "mish", "hardswish", "tanh", "elu", "celu", "selu", "erf", "softsign", "square"}
_PRODUCTS = {"mul", "matmul", "bmm", "mv", "einsum", "linear"}
_MIXING = {
    "linear",
    "addmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "matmul",
    "bmm",
    "einsum",
    "scaled_dot_product_attention",
}


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).rsplit(".", 1)[-1].rstrip("_")


def linearizer_of(linearization: str) -> tuple[Linearizer, set[str]]:
    """What linearizes parts, by its name.

    Args:
        linearization: One of `LINEARIZATIONS`.

    Returns:
        The linearizer; and the names of operations that keep their tangent for want of a rule, filled as it is used.

    Raises:
        ResnetPathsError: If the name is unknown.
    """
    if linearization not in LINEARIZATIONS:
        allowed = nearest_names(str(linearization), LINEARIZATIONS, cutoff=0)
        raise ResnetPathsError("linearization", linearization, f"one of {allowed}")
    if linearization == "tangent":
        return linearize, set()
    detached = Detached()
    return detached, detached.tangents


class Detached:
    """Linearizes parts with gates held, and keeps the names of operations that have no rule.

    Attributes:
        tangents: Names of operations, and classes of modules that are no exported graphs, which keep their tangent
            although they are not linear.
    """

    def __init__(self) -> None:
        self.tangents: set[str] = set()

    def __call__(self, module: nn.Module, state: torch.Tensor, context: Context) -> tuple[torch.Tensor, Pullback]:
        """The output of a part at a point, and the transpose of its linear map."""
        if not isinstance(module, Segment | nn.Identity | CheckedInputs):
            module = self._traced(module, state)
        return linearize(module, state, context, self.operation)

    def _traced(self, module: nn.Module, state: torch.Tensor) -> nn.Module:
        """A module written by hand as the graph of its operations at this point."""
        if not context_read_by(module):
            try:
                with ONE_TRACE:
                    graph = make_fx(module, pre_dispatch=True)(state.clone())
            except Exception:
                graph = None
            # Rules are of operations that return what they compute, not of those that write it over their operand.
            if graph is not None and keeps_its_input(graph):
                return Segment(graph, graph.graph)
        self.tangents.add(type(module).__name__)
        return module

    def operation(self, node: Node, operands: list[Node], values: dict[Node, Any]) -> tuple[Any, Step | None]:
        """The value of a node, and its step, as `linearize_operation`."""
        name = _name(node)
        if not operands:
            return linearize_operation(node, operands, values)
        if name in ("layer_norm", "group_norm", "rms_norm", "instance_norm") and operands == [node.args[0]]:
            return _normalised(node, values, name)
        if name == "scaled_dot_product_attention" and node.args[2] in operands:
            return linearize_operation(node, [node.args[2]], values)  # type: ignore[list-item]
        if name == "div" and node.args[0] in operands:
            return linearize_operation(node, [node.args[0]], values)  # type: ignore[list-item]
        if len(operands) == 1 and (name in _SECANTS or _is_power(name, node)):
            return _secant(node, operands, values)
        if name in _PRODUCTS and len(operands) == 2:
            ranks = [_rank(operand) for operand in operands]
            if ranks[0] != ranks[1]:
                return linearize_operation(node, [operands[ranks.index(max(ranks))]], values)
            return _halves(node, operands, values)
        if name in _PRODUCTS and len(operands) == 1 and node.all_input_nodes.count(operands[0]) == 1:
            repeated = [a for a in node.args if a is operands[0]]
            if len(repeated) == 2:  # x * x
                return _secant(node, operands, values)
        value, step = linearize_operation(node, operands, values)
        if step is None or not _is_curved(node, operands, values):
            return value, step
        pull = _pulls_of(step)

        def pullback(cotangents: Any) -> list[Any]:
            self.tangents.add(
                name
            )  # only here: most gates are read by products alone, through which nothing comes back
            return pull(cotangents)

        return value, Step(step.operands, pullback)


def _is_curved(node: Node, operands: list[Node], values: dict[Node, Any]) -> bool:
    """Whether an operation is not affine on the line from 0 to the point: there tangent and gate differ."""
    if node.target is operator.getitem or not all(isinstance(values[n], torch.Tensor) for n in operands):
        return False

    def at(factor: float) -> Any:
        scaled = {**values, **{n: torch.where(values[n].isinf(), values[n], values[n] * factor) for n in operands}}
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: scaled[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    full, half, none = at(1.0), at(0.5), at(0.0)
    if not isinstance(full, torch.Tensor) or not full.is_floating_point() or not full.numel():
        return False
    bend, known = (full - 2 * half + none).abs(), full.isfinite() & none.isfinite()
    size = torch.where(known, torch.maximum(full.abs(), none.abs()), 0).amax()
    return bool((bend > 1e3 * torch.finfo(full.dtype).eps * size)[known].any())


def _is_power(name: str, node: Node) -> bool:
    return name == "pow" and isinstance(node.args[1], int | float) and node.args[1] > 1


def _rank(node: Node, known: dict[Node, int] | None = None) -> int:
    """Position in `_GATES` of what made a node; their number where it is no gate."""
    known = {} if known is None else known
    if node not in known:
        known[node] = _rank_of_new(node, known)
    return known[node]


def _rank_of_new(node: Node, known: dict[Node, int]) -> int:
    name, none = _name(node), len(_GATES)
    for position, names in enumerate(_GATES):
        if name in names:
            return position
    if name == "pow" and isinstance(node.args[1], int | float) and node.args[1] < 0:
        return 0
    if name in _MIXING or any(read.op == "placeholder" for read in node.all_input_nodes):
        return none
    return max((_rank(read, known) for read in node.all_input_nodes if read.op == "call_function"), default=none)


def _secant(node: Node, operands: list[Node], values: dict[Node, Any]) -> tuple[Any, Step | None]:
    """``f(x) = x * gate(x)`` with the gate held; at 0 its limit, the slope."""
    value: Any
    value, tangent = linearize_operation(node, operands, values)
    x = values[operands[0]]
    slope = torch.zeros_like(x) if tangent is None else _pulls_of(tangent)(torch.ones_like(value)[None])[0][0]
    return value, Step(operands, None, torch.where(x == 0, slope, value / torch.where(x == 0, 1, x)))


def _halves(node: Node, operands: list[Node], values: dict[Node, Any]) -> tuple[Any, Step | None]:
    """Half of a product for each factor, the other held."""
    (value, one), (_, other) = (linearize_operation(node, [operand], values) for operand in operands)
    if one is None or other is None:
        return value, one or other
    pulls = [_pulls_of(step) for step in (one, other)]
    return value, Step(operands, lambda v: [0.5 * pull(v)[0] for pull in pulls])


def _pulls_of(step: Step) -> Callable[[Any], list[Any]]:
    if step.pullback is not None:
        return step.pullback
    factor = step.factor
    assert factor is not None  # a step has one of the two
    return lambda v: [v * factor]


def _normalised(node: Node, values: dict[Node, Any], name: str) -> tuple[Any, Step | None]:
    """A norm with its denominator held: ``weight * (x - mean) / sqrt(variance + eps) + bias`` or without the mean."""
    target: Any = node.target
    arguments: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    args, kwargs = arguments
    schema = [argument.name for argument in target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(schema, args, strict=False)), **kwargs}
    x = args[0]
    value = linearize_operation(node, [], values)[0]
    weight: torch.Tensor | None = given.get("weight")
    if name in ("layer_norm", "rms_norm"):
        dims = tuple(range(x.dim() - len(given["normalized_shape"]), x.dim()))
        grouped = x.shape
    else:
        groups = given["num_groups"] if name == "group_norm" else x.shape[1]
        grouped = torch.Size((len(x), groups, x.shape[1] // groups, *x.shape[2:]))
        dims = tuple(range(2, len(grouped)))
        weight = None if weight is None else weight.reshape(-1, *[1] * (x.dim() - 2))
    centred = name != "rms_norm"
    values_in_groups = x.reshape(grouped)
    if centred:
        values_in_groups = values_in_groups - values_in_groups.mean(dims, keepdim=True)
    eps = given.get("eps")
    default = torch.finfo(x.dtype).eps if name == "rms_norm" else 1e-5
    scale = torch.rsqrt(values_in_groups.square().mean(dims, keepdim=True) + (default if eps is None else eps))
    shifted = tuple(d + 1 for d in dims)

    def pullback(cotangents: torch.Tensor) -> list[torch.Tensor]:
        rows = cotangents if weight is None else cotangents * weight
        rows = rows.reshape(len(rows), *grouped) * scale
        if centred:
            rows = rows - rows.mean(shifted, keepdim=True)
        return [rows.reshape(cotangents.shape)]

    return value, Step([node.args[0]], pullback, is_new=True)  # type: ignore[list-item]

"""The transposed Jacobian of a module at a point, applied to a whole stack of cotangents at once.

Gradients by path length push dozens of cotangents through one block at one point. Autograd does that by running its
backward under `torch.vmap`, whose rules for convolutions and BatchNorm cost several times the arithmetic. Here the
exported graph of a part is walked instead, operation by operation (`resnet_paths.core.backward.operations`); two
multiplications in a row are multiplied once, beforehand.

Parts that are not an exported graph, such as modules in a chain built by hand, go through autograd as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from resnet_paths._utils.devices import wide
from resnet_paths.core.backward.operations import WITHOUT_VMAP_WARNINGS, Step, linearize_operation, sum_to_shape
from resnet_paths.core.input_sizes import CheckedInputs
from resnet_paths.core.parts import LinearCombination, Placed, context_read_by
from resnet_paths.core.segments import Segment

__all__ = [
    "Context",
    "Pullback",
    "broadcast",
    "expanded",
    "finite",
    "inner_products",
    "linearize",
    "linearize_all",
    "unchanged",
    "vjp_of_each",
    "with_constant",
]

LinearizeOperation = Callable[[Node, list[Node], dict[Node, Any]], tuple[Any, Step | None]]
"""From a node, those that it reads and that carry a gradient, and all values to its value and step."""

_PullAll = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Context:
    """What blocks and head read in addition to the state, at a point.

    Attributes:
        values: Tensors by name.
        carrying: Names of those through which a gradient flows; the others are constants.
    """

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    carrying: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pullback:
    """The transposed Jacobian of a module at a point, for stacks of cotangents.

    Attributes:
        of_all: From cotangents of the output, [K, *output.shape], to those of the state and of each entry of the
            context that the module reads and that carries a gradient, [K, *shape] each. It is linear, and may be called
            any number of times.
        context: Names of these entries.
    """

    of_all: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    context: tuple[str, ...] = ()

    def __call__(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Cotangents of the state alone, [K, *input.shape]."""
        return self.of_all(cotangents)[0]


def with_constant(
    pullback: Pullback, name: str, output: torch.Tensor, state: torch.Tensor, context: Context
) -> Pullback:
    """The same pullback, which also gives the cotangent of the constant of the part: ``<v, output> - <J^T v, input>``.

    At a point every part is the affine map ``J x + c`` with ``c = output - J x``.

    Args:
        pullback: Transposed Jacobian of the part; any linear map splits the output exactly.
        name: Name of the entry of the context that stands for the constant.
        output: What the part returns at the point.
        state: What it reads there.
        context: What it may read in addition to that.

    Returns:
        A pullback with one more entry of the context, of cotangents [K, batch] in float64; the same one of an
        identity, which has no constant.
    """
    if pullback is unchanged:
        return pullback
    read_from = [state, *(finite(context.values[each]) for each in pullback.context)]

    def of_all(cotangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pieces = pullback.of_all(cotangents)
        constant = inner_products(cotangents, output)
        for piece, value in zip(pieces, read_from, strict=True):
            constant -= inner_products(piece, value)
        return (*pieces, constant)

    return Pullback(of_all, (*pullback.context, name))


def inner_products(stack: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``<row, values>`` of each example, float64.

    Args:
        stack: Cotangents [K, batch, ...].
        values: [batch, ...], or what an addition broadcasts to that.

    Returns:
        [K, batch].
    """
    values = values.expand(stack.shape[1:])
    if values.dim() == 4 and stack[0].is_contiguous(memory_format=torch.channels_last):
        stack, values = stack.movedim(2, 4), values.movedim(1, 3)  # in the order of their memory: no copies
    dtype = torch.promote_types(stack.dtype, torch.float32)
    rows = stack.reshape(*stack.shape[:2], -1).permute(1, 2, 0).to(dtype)
    return wide(torch.bmm(values.reshape(len(values), 1, -1).to(dtype), rows)[:, 0].T)


def finite(values: torch.Tensor) -> torch.Tensor:
    """Values with 0 for infinities, as in a mask that is added to attention scores: their cotangents are 0."""
    return torch.where(values.isinf(), 0, values)


unchanged = Pullback(lambda cotangents: (cotangents,))
"""The transposed Jacobian of the identity."""


def broadcast(pullback: Pullback, output: torch.Tensor, total: torch.Tensor) -> Pullback:
    """The transposed Jacobian of a part whose output an addition broadcasts.

    Args:
        pullback: That of the part alone.
        output: What the part returns.
        total: The sum.

    Returns:
        A pullback of cotangents of the sum; the same one where nothing is broadcast, and where the part has no row for
        each example: it is then a constant.
    """
    if output.shape == total.shape or output.shape[:1] != total.shape[:1] or output.dim() != total.dim():
        return pullback
    return Pullback(lambda stack: pullback.of_all(sum_to_shape(stack, output.shape)), pullback.context)


def expanded(tangents: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The tangents of what an addition broadcasts, in the shape of the sum.

    Args:
        tangents: Those of the output of a part, [K, *output.shape].
        total: The sum.

    Returns:
        [K, *total.shape].
    """
    missing = total.dim() + 1 - tangents.dim()
    return tangents.reshape(len(tangents), *[1] * missing, *tangents.shape[1:]).expand(-1, *total.shape)


def linearize(
    module: nn.Module,
    state: torch.Tensor,
    context: Context = Context(),
    operation: LinearizeOperation = linearize_operation,
) -> tuple[torch.Tensor, Pullback]:
    """The output of a part of a chain at a point, and its transposed Jacobian there.

    Args:
        module: A part in eval mode.
        state: What it reads; where to linearize.
        context: What it may read in addition to that.
        operation: What linearizes an operation of an exported graph.

    Returns:
        The output, and its pullback.

    Example:
        >>> double = LinearCombination([nn.Identity()], [2.0])
        >>> output, pullback = linearize(double, torch.ones(3))
        >>> output, pullback(torch.eye(3)).diagonal()
        (tensor([2., 2., 2.]), tensor([2., 2., 2.]))
    """
    if isinstance(module, nn.Identity):
        return state, unchanged
    if isinstance(module, CheckedInputs):
        return linearize(module.module, module.check(state)[0], context, operation)
    if isinstance(module, Placed):
        start, dim, size = module.before, module.dim + 1, state.shape[module.dim]
        return module(state), Pullback(lambda cotangents: (cotangents.narrow(dim, start, size),))
    if type(module) is nn.Sequential:
        return _linearize_in_series(list(module), state, context, operation)
    if isinstance(module, LinearCombination) and len(module) == 1:
        (factor,) = module.factors
        output, inside = linearize(module[0], state, context, operation)
        return factor * output, Pullback(lambda cotangents: inside.of_all(factor * cotangents), inside.context)
    read = context_read_by(module) if context.values else ()
    carrying = tuple(name for name in read if name in context.carrying)
    constants = {name: context.values[name] for name in read if name not in carrying}
    inputs = [state, *(context.values[n] for n in carrying)]
    (output,), pull = linearize_all(module, inputs, carrying, constants, operation)
    return output, Pullback(lambda cotangents: pull([cotangents]), carrying)


def linearize_all(
    module: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    names: Sequence[str] = (),
    constants: Mapping[str, torch.Tensor] | None = None,
    operation: LinearizeOperation = linearize_operation,
) -> tuple[list[torch.Tensor], _PullAll]:
    """A module or function of several inputs and outputs at a point, and its transposed Jacobian there.

    Args:
        module: The module, or a function of tensors that returns a tensor or a tuple.
        inputs: Where to linearize; tensors without a floating dtype have no gradient.
        names: Names of the last inputs, which are passed by keyword; the others are passed by position.
        constants: Further arguments by keyword, through which no gradient flows.
        operation: What linearizes an operation of an exported graph.

    Returns:
        The outputs, and the map from one stack of cotangents for each output to one for each input.
    """
    constants = constants or {}
    with torch.no_grad():
        if isinstance(module, Segment):
            return _linearize_graph(module, inputs, names, constants, operation)
        return _linearize_by_autograd(module, inputs, names, constants)


def _linearize_in_series(
    modules: Sequence[nn.Module], state: torch.Tensor, context: Context, operation: LinearizeOperation
) -> tuple[torch.Tensor, Pullback]:
    pullbacks: list[Pullback] = []
    for module in modules:
        state, pullback = linearize(module, state, context, operation)
        pullbacks.append(pullback)
    names = tuple(dict.fromkeys(name for pullback in pullbacks for name in pullback.context))

    def pull_through_all(cotangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: dict[str, torch.Tensor] = {}
        for pullback in reversed(pullbacks):
            cotangents, *read = pullback.of_all(cotangents)
            for name, piece in zip(pullback.context, read, strict=True):
                found[name] = found[name] + piece if name in found else piece
        return (cotangents, *(found[name] for name in names))

    return state, Pullback(pull_through_all, names)


def _linearize_by_autograd(
    module: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    names: Sequence[str],
    constants: Mapping[str, torch.Tensor],
) -> tuple[list[torch.Tensor], _PullAll]:
    leaves = [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in inputs]
    with torch.enable_grad():
        # On copies: a module may begin with an operation in place, which leaves do not allow.
        copies = [t.clone() for t in leaves]
        first = len(copies) - len(names)
        output = module(*copies[:first], **dict(zip(names, copies[first:], strict=True)), **constants)
    results = list(output) if isinstance(output, tuple) else [output]

    def pull(stacks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        live = [(y, v) for y, v in zip(results, stacks, strict=True) if y.requires_grad]
        return vjp_of_each([y for y, _ in live], leaves, [v for _, v in live], len(stacks[0]))

    return [y.detach() for y in results], pull


def vjp_of_each(
    outputs: list[torch.Tensor], inputs: Sequence[torch.Tensor], stacks: list[torch.Tensor], size: int
) -> tuple[torch.Tensor, ...]:
    """Vector-Jacobian products with each row of a stack, by autograd.

    Args:
        outputs: Tensors that require a gradient.
        inputs: What they are functions of; those that require no gradient get zeros.
        stacks: Cotangents of each output, [K, *output.shape].
        size: K.

    Returns:
        Cotangents of each input, [K, *input.shape].
    """
    wanted = [x for x in inputs if x.requires_grad]

    def vjp(cotangents: list[torch.Tensor], *, batched: bool) -> list[torch.Tensor | None]:
        if not outputs:
            return [None] * len(wanted)
        return list(
            torch.autograd.grad(
                outputs,
                wanted,
                cotangents,
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),  # for `resnet_paths.core.backward.tangents`
                allow_unused=True,
                is_grads_batched=batched,
            )
        )

    try:
        with WITHOUT_VMAP_WARNINGS:
            found = vjp(stacks, batched=True)
    except RuntimeError:  # an operation that vmap does not know, such as an autograd.Function of the user's
        rows = [vjp([stack[k] for stack in stacks], batched=False) for k in range(size)]
        found = [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
    each = iter(found)
    of_inputs = [next(each) if x.requires_grad else None for x in inputs]
    return tuple(x.new_zeros(size, *x.shape) if v is None else v for x, v in zip(inputs, of_inputs, strict=True))


def _linearize_graph(
    segment: Segment,
    inputs: Sequence[torch.Tensor],
    names: Sequence[str],
    constants: Mapping[str, torch.Tensor],
    operation: LinearizeOperation,
) -> tuple[list[torch.Tensor], _PullAll]:
    nodes = list(segment.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    by_name = dict(zip(names, inputs[len(inputs) - len(names) :], strict=True)) | dict(constants)
    by_position = inputs[: len(inputs) - len(names)]
    given = [*by_position, *(by_name[str(node.target)] for node in placeholders[len(by_position) :])]
    values: dict[Node, Any] = dict(zip(placeholders, given, strict=True))
    sources = [node for node in placeholders if str(node.target) not in constants]
    carrying = {node for node in sources if values[node].is_floating_point() or values[node].is_complex()}
    of_name = {str(node.target): node for node in sources}
    sources = [*sources[: len(by_position)], *(of_name[name] for name in names)]
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    steps: dict[Node, Step] = {}
    result = nodes[0]
    for node in nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(segment)
            continue
        if node.op == "output":
            result = node.args[0]
            break
        operands = [n for n in node.all_input_nodes if n in carrying or n in steps]
        values[node], step = operation(node, operands, values)
        if step is not None:
            steps[node] = _fused(step, steps)
        for read in node.all_input_nodes:
            if last_use[read] is node:
                values.pop(read, None)

    def pull(stacks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        (cotangents,) = stacks
        found = _pull_through(steps, result, cotangents)
        return tuple(
            found[node] if node in found else x.new_zeros(len(cotangents), *x.shape)
            for node, x in zip(sources, inputs, strict=True)
        )

    return [values[result]], pull


def _pull_through(steps: dict[Node, Step], result: Node, cotangents: torch.Tensor) -> dict[Node, torch.Tensor]:
    """Cotangents of the nodes with which the graph begins, given those of its result."""
    waiting: dict[Node, Any] = {result: cotangents}
    ours: set[Node] = set()  # those whose cotangents may be overwritten
    for node, step in reversed(steps.items()):
        if node not in waiting:
            continue
        arrived = waiting.pop(node)
        if step.pullback is not None:
            pieces = step.pullback(arrived)
        else:
            pieces = [arrived.mul_(step.factor) if node in ours else arrived * step.factor]
        for operand, piece in zip(step.operands, pieces, strict=True):
            if step.is_new or step.factor is not None or operand in waiting:
                ours.add(operand)
            waiting[operand] = _sum_of(waiting[operand], piece) if operand in waiting else piece
    return waiting


def _sum_of(one: Any, other: Any) -> Any:
    """Cotangents of a node that is read twice; those of a node with several results are kept by its index."""
    if isinstance(one, dict):
        return {i: one[i] + other[i] if i in one and i in other else one.get(i, other.get(i)) for i in one | other}
    return one + other


def _fused(step: Step, steps: dict[Node, Step]) -> Step:
    """Two multiplications in a row as one, where nothing else reads what is between."""
    if step.factor is None:
        return step
    (before,) = step.operands
    earlier = steps.get(before)
    if earlier is None or earlier.factor is None or len(before.users) > 1:
        return step
    del steps[before]
    return Step(earlier.operands, None, earlier.factor * step.factor)

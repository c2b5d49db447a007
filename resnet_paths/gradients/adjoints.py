"""The transposed Jacobian of a module at a point, applied to a whole stack of cotangents at once.

Gradients by path length push dozens of cotangents through one block at one point. Autograd does that by running its
backward under `torch.vmap`, whose rules for convolutions and BatchNorm cost several times the arithmetic. Here the
exported graph of a part is walked instead, operation by operation:

- a convolution or a linear map becomes its transpose, with the stack folded into the batch: one call for all;
- pointwise operations and BatchNorm in eval mode are multiplications; neighbours are multiplied once, beforehand;
- whatever else a network holds (attention, pooling, LayerNorm...) is torch's own VJP, vmapped over the stack.

Parts that are no exported graph, such as modules in a chain built by hand, go through autograd as a whole.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from resnet_paths.core.parts import Placed, Scaled
from resnet_paths.core.segments import Segment
from resnet_paths.unraveling.tracing import FixedShape

__all__ = ["Pullback", "each_part", "linearize", "unchanged"]

aten = torch.ops.aten

Pullback = Callable[[Any], Any]
"""From a stack of cotangents of the output, [K, *output.shape], to one of cotangents of the input, [K, *input.shape].

Where a state is a tuple of tensors, so are the stacks."""


def linearize(module: nn.Module, inputs: Any) -> tuple[Any, Pullback]:
    """A module's output at a point, and its transposed Jacobian there.

    Args:
        module: A module of one input, in eval mode.
        inputs: A tensor, or a tuple of tensors; where to linearize.

    Returns:
        The output, and the map from stacks of cotangents of the output to stacks of cotangents of the input. The map
        is linear and may be called any number of times.

    Example:
        >>> double = Scaled(nn.Identity(), 2.0)
        >>> output, pullback = linearize(double, torch.ones(3))
        >>> output, pullback(torch.eye(3)).diagonal()
        (tensor([2., 2., 2.]), tensor([2., 2., 2.]))
    """
    if isinstance(module, nn.Identity):
        return inputs, unchanged
    if isinstance(module, FixedShape):
        return linearize(module.module, module.check(inputs)[0])
    if isinstance(module, Placed):
        start, dim = module.before, module.dim + 1
        size = inputs.shape[module.dim]
        return module(inputs), lambda cotangents: cotangents.narrow(dim, start, size)
    if type(module) is nn.Sequential:
        return _linearize_in_series(list(module), inputs)
    if isinstance(module, Scaled):
        output, pullback = linearize(module.branch, inputs)
        factor = module.factor
        return each_part(lambda t: factor * t, output), lambda cotangents: pullback(
            each_part(lambda t: factor * t, cotangents)
        )
    with torch.no_grad():
        if isinstance(module, Segment) and isinstance(inputs, torch.Tensor):
            return _linearize_graph(module, inputs)
        return _linearize_by_autograd(module, inputs)


def unchanged(cotangents: Any) -> Any:
    """The transposed Jacobian of the identity.

    Args:
        cotangents: A stack.

    Returns:
        The same stack.
    """
    return cotangents


def _linearize_in_series(modules: Sequence[nn.Module], inputs: Any) -> tuple[Any, Pullback]:
    pullbacks = []
    for module in modules:
        inputs, pullback = linearize(module, inputs)
        pullbacks.append(pullback)

    def pull_through_all(cotangents: Any) -> Any:
        for pullback in reversed(pullbacks):
            cotangents = pullback(cotangents)
        return cotangents

    return inputs, pull_through_all


def each_part(function: Callable[..., Any], *states: Any) -> Any:
    """`function` of states, part by part where they are tuples.

    Args:
        function: Of tensors.
        *states: Tensors, or tuples of as many tensors each.

    Returns:
        What it returns, in a tuple where the states are.
    """
    if isinstance(states[0], tuple):
        return tuple(function(*parts) for parts in zip(*states, strict=True))
    return function(*states)


def _linearize_by_autograd(module: nn.Module, inputs: Any) -> tuple[Any, Pullback]:
    leaves = each_part(lambda t: t.detach().requires_grad_(t.is_floating_point() or t.is_complex()), inputs)
    with torch.enable_grad():
        # On copies: a module may begin with an operation in place, which leaves do not allow.
        output = module(each_part(torch.clone, leaves))
    sources = leaves if isinstance(leaves, tuple) else (leaves,)
    results = output if isinstance(output, tuple) else (output,)

    def pullback(cotangents: Any) -> Any:
        stacks = cotangents if isinstance(cotangents, tuple) else (cotangents,)
        live = [(y, v) for y, v in zip(results, stacks, strict=True) if y.requires_grad]
        found = _vjp_of_each([y for y, _ in live], sources, [v for _, v in live], len(stacks[0]))
        return found if isinstance(inputs, tuple) else found[0]

    return each_part(torch.Tensor.detach, output), pullback


def _vjp_of_each(
    outputs: list[torch.Tensor], inputs: Sequence[torch.Tensor], stacks: list[torch.Tensor], size: int
) -> tuple[torch.Tensor, ...]:
    def vjp(cotangents: list[torch.Tensor], *, batched: bool) -> list[torch.Tensor | None]:
        if not outputs:
            return [None] * len(inputs)
        return list(
            torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        )

    try:
        with _without_vmap_warnings():
            found = vjp(stacks, batched=True)
    except RuntimeError:  # an operation that vmap does not know, such as an autograd.Function of the user's
        rows = [vjp([stack[k] for stack in stacks], batched=False) for k in range(size)]
        found = [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
    return tuple(x.new_zeros(size, *x.shape) if v is None else v for x, v in zip(inputs, found, strict=True))


@dataclass
class _Step:
    """How cotangents of a node become cotangents of the nodes that it reads; `factor` alone if it only multiplies."""

    operands: list[Node]
    pullback: Callable[[Any], list[Any]] | None
    factor: torch.Tensor | None = None
    is_new: bool = False  # whether what `pullback` returns is new memory that nothing else reads


def _linearize_graph(segment: Segment, inputs: torch.Tensor) -> tuple[torch.Tensor, Pullback]:
    nodes = list(segment.graph.nodes)
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    values: dict[Node, Any] = {}
    steps: dict[Node, _Step] = {}
    source = result = nodes[0]
    for node in nodes:
        if node.op == "placeholder":
            values[node] = inputs
            continue
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(segment)
            continue
        if node.op == "output":
            result = node.args[0]
            break
        operands = [n for n in node.all_input_nodes if n is source or n in steps]
        values[node], step = _linearize_operation(node, operands, values)
        if step is not None:
            steps[node] = _fused(step, steps)
        for read in node.all_input_nodes:
            if last_use[read] is node:
                values.pop(read, None)
    output = values[result]

    def pullback(cotangents: torch.Tensor) -> torch.Tensor:
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
        if source not in waiting:
            return inputs.new_zeros(len(cotangents), *inputs.shape)
        found: torch.Tensor = waiting[source]
        return found

    return output, pullback


def _sum_of(one: Any, other: Any) -> Any:
    """Cotangents of a node that is read twice; those of a node with several results are kept by its index."""
    if isinstance(one, dict):
        return {i: one[i] + other[i] if i in one and i in other else one.get(i, other.get(i)) for i in one | other}
    return one + other


def _fused(step: _Step, steps: dict[Node, _Step]) -> _Step:
    """Two multiplications in a row as one, where nothing else reads what stands between."""
    if step.factor is None:
        return step
    (before,) = step.operands
    earlier = steps.get(before)
    if earlier is None or earlier.factor is None or len(before.users) > 1:
        return step
    del steps[before]
    return _Step(earlier.operands, None, earlier.factor * step.factor)


def _linearize_operation(node: Node, operands: list[Node], values: dict[Node, Any]) -> tuple[Any, _Step | None]:
    """The value of a node, and its step if a cotangent can flow through it."""

    def evaluate(*replaced: torch.Tensor) -> Any:
        chosen = dict(zip(operands, replaced, strict=True))
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda n: chosen[n] if n in chosen else values[n]
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    points = [values[n] for n in operands]
    target: Any = node.target
    args: list[Any] = [values[a] if isinstance(a, Node) and a in values else a for a in node.args]
    if node.target is operator.getitem and operands:
        index = node.args[1]
        value = points[0][index]
        return value, _Step(operands, lambda v: [{index: v}]) if _carries(value) else None
    if not operands:
        return evaluate(), None
    if target in _TRANSPOSES and not node.kwargs and operands == [node.args[_OPERAND.get(target, 0)]]:
        transpose = _TRANSPOSES[target](points[0], *args)
        if transpose is not None:
            return evaluate(*points), _Step(operands, lambda v: [transpose(v)], is_new=True)
    if target is aten.batch_norm.default and operands == [node.args[0]]:
        _, weight, _, _, variance, training, _, eps, _ = args
        if not training:
            scale = torch.rsqrt(variance + eps) * (1 if weight is None else weight)
            return evaluate(*points), _Step(operands, None, scale.reshape(-1, *[1] * (points[0].dim() - 2)))
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return _linearize_pointwise(evaluate, operands, points)
    return _linearize_by_vjp(evaluate, operands, points)


def _carries(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _linearize_pointwise(
    evaluate: Callable[..., Any], operands: list[Node], points: list[torch.Tensor]
) -> tuple[Any, _Step | None]:
    """Each output value depends on the input values at its own place: the Jacobian is a multiplication."""
    value = evaluate(*points)
    if not _carries(value):
        return value, None
    if any(map(torch.is_complex, [value, *points])):  # no multiplication by one complex number
        return _linearize_by_vjp(evaluate, operands, points)
    leaves = [x.expand(value.shape).detach().requires_grad_(_carries(x)) for x in points]
    with torch.enable_grad():
        again = evaluate(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    slopes = iter(
        torch.autograd.grad(again, wanted, torch.ones_like(again), allow_unused=True)
        if again.requires_grad
        else [None] * len(wanted)
    )
    factors = [next(slopes) if x.requires_grad else None for x in leaves]
    if len(operands) == 1 and points[0].shape == value.shape and factors[0] is not None:
        return value, _Step(operands, None, factors[0])
    # Slopes that are all 1, as in an addition, need no multiplication.
    factors = [None if f is None else _ONE if bool((f == 1).all()) else f for f in factors]

    def pullback(cotangents: torch.Tensor) -> list[torch.Tensor]:
        pieces = []
        for x, factor in zip(points, factors, strict=True):
            if factor is None:
                pieces.append(torch.zeros(len(cotangents), *x.shape, dtype=x.dtype, device=x.device))
                continue
            piece = cotangents if factor is _ONE else cotangents * factor
            pieces.append(_sum_to_shape(piece, x.shape).to(x.dtype))
        return pieces

    return value, _Step(operands, pullback)


_ONE = torch.ones(())


def _sum_to_shape(stack: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo the broadcasting of an operand of `shape`, in each entry of the stack."""
    extra = stack.dim() - 1 - len(shape)
    if extra:
        stack = stack.sum(tuple(range(1, 1 + extra)))
    repeated = [i + 1 for i, size in enumerate(shape) if size == 1 and stack.shape[i + 1] != 1]
    return stack.sum(repeated, keepdim=True) if repeated else stack


def _linearize_by_vjp(
    evaluate: Callable[..., Any], operands: list[Node], points: list[torch.Tensor]
) -> tuple[Any, _Step | None]:
    value = evaluate(*points)
    several = isinstance(value, tuple | list)
    results = list(value) if several else [value]
    kept = [i for i, x in enumerate(points) if _carries(x)]
    carrying = [i for i, y in enumerate(results) if _carries(y)]  # others are indices or sizes
    if not kept or not carrying:
        return value, None

    def of_kept(*replaced: torch.Tensor) -> list[torch.Tensor]:
        chosen = list(points)
        for i, x in zip(kept, replaced, strict=True):
            chosen[i] = x
        again = evaluate(*chosen)
        return [again[i] for i in carrying] if several else [again]

    vjp = torch.func.vjp(of_kept, *(points[i] for i in kept))[1]

    def pullback(cotangents: Any) -> list[torch.Tensor]:
        stacks = [cotangents]
        if several:
            size = len(next(iter(cotangents.values())))
            stacks = [
                cotangents[i] if i in cotangents else results[i].new_zeros(size, *results[i].shape) for i in carrying
            ]
        try:
            with _without_vmap_warnings():
                return list(torch.vmap(vjp)(stacks))
        except RuntimeError:  # an operation that vmap does not know, or gets wrong
            rows = [vjp(list(row)) for row in zip(*stacks, strict=True)]
            return [torch.stack(column) for column in zip(*rows, strict=True)]

    return value, _Step([operands[i] for i in kept], pullback)


class _without_vmap_warnings(warnings.catch_warnings):  # noqa: N801 - reads as the statement that it is
    """Say nothing of operations that vmap takes one by one: slow, not wrong."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*performance drop.*")


def _transposed_convolution(
    x: torch.Tensor,
    _: Any,
    weight: torch.Tensor,
    bias: Any = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The transpose of a convolution, for the whole stack as one batch."""
    dims = weight.dim() - 2
    if x.dim() != weight.dim() or isinstance(padding, str):
        return None  # an input without batch, or 'same': left to torch's own VJP
    stride, padding, dilation = ((list(p) * dims)[:dims] for p in (stride, padding, dilation))
    # Input positions that the last stride does not reach.
    missing = [
        (size + 2 * p - d * (k - 1) - 1) % s
        for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]

    def pullback(cotangents: torch.Tensor) -> torch.Tensor:
        folded = cotangents.flatten(0, 1)
        if folded.dtype == torch.float64:
            # CPUs have no fast kernel for these; the plain backward is the best there is.
            shape = (len(folded), *x.shape[1:])
            images: torch.Tensor = aten.convolution_backward(
                folded.contiguous(),
                x.new_empty(1).expand(shape),
                weight,
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * dims,
                groups,
                [True, False, False],
            )[0]
            return images.view(*cotangents.shape[:2], *images.shape[1:])
        if dims == 2:
            # Several times faster than the other layout on CPUs, and what tensor cores want.
            folded = folded.contiguous(memory_format=torch.channels_last)
        images = transposed(folded, weight, None, stride, padding, missing, groups, dilation)
        return images.view(*cotangents.shape[:2], *images.shape[1:])

    return pullback


def _transposed_linear(_x: Any, _: Any, weight: torch.Tensor, _bias: Any = None) -> Callable[[Any], Any] | None:
    if weight.dim() != 2:
        return None
    return lambda cotangents: cotangents @ weight


def _transposed_addmm(_x: Any, _bias: Any, _: Any, weight: torch.Tensor) -> Callable[[Any], Any]:
    return lambda cotangents: cotangents @ weight.T


def _placed(choose: Callable[..., torch.Tensor]) -> Callable[..., Callable[[torch.Tensor], torch.Tensor]]:
    """The transpose of a choice of places: zeros elsewhere; under vmap torch's own is wrong for negative places."""

    def transpose(x: torch.Tensor, _: Any, dim: int = 0, *where: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def pullback(cotangents: torch.Tensor) -> torch.Tensor:
            whole = cotangents.new_zeros(len(cotangents), *x.shape)
            choose(whole, dim % x.dim() + 1, *where).copy_(cotangents)
            return whole

        return pullback

    return transpose


_TRANSPOSES: dict[Any, Callable[..., Callable[[Any], Any] | None]] = {
    aten.conv1d.default: _transposed_convolution,
    aten.conv2d.default: _transposed_convolution,
    aten.conv3d.default: _transposed_convolution,
    aten.linear.default: _transposed_linear,
    aten.addmm.default: _transposed_addmm,
    aten.slice.Tensor: _placed(aten.slice.Tensor),
    aten.select.int: _placed(aten.select.int),
}
_OPERAND = {aten.addmm.default: 1}

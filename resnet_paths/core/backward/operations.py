"""The transposed Jacobian of one operation of an exported graph.

- A convolution or a linear map becomes its transpose, with the stack folded into the batch: one call for all.
- Pointwise operations and BatchNorm in eval mode are multiplications.
- Every other operation (attention, pooling, LayerNorm) uses torch's own VJP, vmapped over the stack.

So every operator works without an entry in a table. An entry of ``_TRANSPOSES`` makes a linear operator faster, with
one of ``_OPERAND`` where the first argument is not the operand.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import torch
from torch.fx import Node
from torch.nn import functional as F

from resnet_paths._utils.threads import SharedContext

__all__ = ["WITHOUT_VMAP_WARNINGS", "Step", "linearize_operation"]

aten = torch.ops.aten

_Evaluate: TypeAlias = Callable[..., Any]
"""An operation as a function of some of its operands; what it returns may be a tensor, several, or a number."""

_Transpose: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""From a stack of cotangents of a result to one of an operand."""


@dataclass
class Step:
    """How cotangents of a node become cotangents of the nodes that it reads; `factor` alone if it only multiplies."""

    operands: list[Node]
    pullback: Callable[[Any], list[Any]] | None
    factor: torch.Tensor | None = None
    is_new: bool = False  # whether what `pullback` returns is new memory that nothing else reads


def linearize_operation(node: Node, operands: list[Node], values: dict[Node, Any]) -> tuple[object, Step | None]:
    """The value of a node, and its step if a cotangent can flow through it."""

    def evaluate(*replaced: torch.Tensor) -> Any:
        chosen = dict(zip(operands, replaced, strict=True))
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda n: chosen[n] if n in chosen else values[n]
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    points = [values[n] for n in operands]
    target: object = node.target
    args: list[Any] = [values[a] if isinstance(a, Node) and a in values else a for a in node.args]
    if node.target is operator.getitem and operands:
        index = node.args[1]
        value = points[0][index]
        return value, Step(operands, lambda v: [{index: v}]) if _carries(value) else None
    if not operands:
        return evaluate(), None
    if target in _TRANSPOSES and not node.kwargs and operands == [node.args[_OPERAND.get(target, 0)]]:
        transpose = _TRANSPOSES[target](points[0], *args)
        if transpose is not None:
            return evaluate(*points), Step(operands, lambda v: [transpose(v)], is_new=True)
    if target is aten.batch_norm.default and operands == [node.args[0]]:
        _, weight, _, _, variance, training, _, eps, _ = args
        if not training:
            scale = torch.rsqrt(variance + eps) * (1 if weight is None else weight)
            return evaluate(*points), Step(operands, None, scale.reshape(-1, *[1] * (points[0].dim() - 2)))
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return _linearize_pointwise(evaluate, operands, points)
    return _linearize_by_vjp(evaluate, operands, points)


def _carries(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _linearize_pointwise(
    evaluate: _Evaluate, operands: list[Node], points: list[torch.Tensor]
) -> tuple[object, Step | None]:
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
        return value, Step(operands, None, factors[0])
    # Slopes that are all 1, as in an addition, need no multiplication.
    factors = [None if f is None else _ONE if bool((f == 1).all()) else f for f in factors]

    def pullback(cotangents: torch.Tensor) -> list[torch.Tensor]:
        pieces = []
        for x, factor in zip(points, factors, strict=True):
            if factor is None:
                pieces.append(torch.zeros(len(cotangents), *x.shape, dtype=x.dtype, device=x.device))
                continue
            piece = cotangents if factor is _ONE else cotangents * factor
            pieces.append(sum_to_shape(piece, x.shape).to(x.dtype))
        return pieces

    return value, Step(operands, pullback)


_ONE = torch.ones(())


def sum_to_shape(stack: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo the broadcasting of an operand, in each entry of a stack of cotangents.

    Args:
        stack: Cotangents of what it was broadcast to, [K, ...].
        shape: Shape of the operand.

    Returns:
        Cotangents of the operand, [K, *shape].
    """
    extra = stack.dim() - 1 - len(shape)
    if extra:
        stack = stack.sum(tuple(range(1, 1 + extra)))
    repeated = [i + 1 for i, size in enumerate(shape) if size == 1 and stack.shape[i + 1] != 1]
    return stack.sum(repeated, keepdim=True) if repeated else stack


def _linearize_by_vjp(
    evaluate: _Evaluate, operands: list[Node], points: list[torch.Tensor]
) -> tuple[object, Step | None]:
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
            with WITHOUT_VMAP_WARNINGS:
                return list(torch.vmap(vjp)(stacks))
        except RuntimeError:  # an operation that vmap does not know, or gets wrong
            rows = [vjp(list(row)) for row in zip(*stacks, strict=True)]
            return [torch.stack(column) for column in zip(*rows, strict=True)]

    return value, Step([operands[i] for i in kept], pullback)


@contextlib.contextmanager
def _without_vmap_warnings() -> Iterator[None]:
    # Not a filter: torch itself saves and restores the list of filters in the threads that run here.
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


WITHOUT_VMAP_WARNINGS = SharedContext(_without_vmap_warnings)
"""Says nothing of operations that vmap takes one by one: slow, not wrong."""


def _transposed_convolution(
    x: torch.Tensor,
    _: object,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> _Transpose | None:
    """The transpose of a convolution, for the whole stack as one batch."""
    dims = weight.dim() - 2
    if x.dim() != weight.dim() or isinstance(padding, str):
        return None  # an input without batch, or 'same': left to torch's own VJP
    strides, paddings, dilations = ((list(p) * dims)[:dims] for p in (stride, padding, dilation))
    # Input positions that the last stride does not reach.
    missing = [
        (size + 2 * p - d * (k - 1) - 1) % s
        for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], strides, paddings, dilations, strict=True)
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
                strides,
                paddings,
                dilations,
                False,
                [0] * dims,
                groups,
                [True, False, False],
            )[0]
            return images.view(*cotangents.shape[:2], *images.shape[1:])
        if dims == 2:
            # Several times faster than the other layout on CPUs, and what tensor cores want.
            folded = folded.contiguous(memory_format=torch.channels_last)
        images = transposed(folded, weight, None, strides, paddings, missing, groups, dilations)
        return images.view(*cotangents.shape[:2], *images.shape[1:])

    return pullback


def _transposed_linear(_x: object, _: object, weight: torch.Tensor, _bias: object = None) -> _Transpose | None:
    if weight.dim() != 2:
        return None
    return lambda cotangents: cotangents @ weight


def _transposed_addmm(_x: object, _bias: object, _: object, weight: torch.Tensor) -> _Transpose:
    return lambda cotangents: cotangents @ weight.T


def _placed(choose: Callable[..., torch.Tensor]) -> Callable[..., _Transpose]:
    """The transpose of a choice of places: zeros elsewhere; under vmap torch's own is wrong for negative places."""

    def transpose(x: torch.Tensor, _: object, dim: int = 0, *where: object) -> _Transpose:
        def pullback(cotangents: torch.Tensor) -> torch.Tensor:
            whole = cotangents.new_zeros(len(cotangents), *x.shape)
            choose(whole, dim % x.dim() + 1, *where).copy_(cotangents)
            return whole

        return pullback

    return transpose


_TRANSPOSES: dict[object, Callable[..., _Transpose | None]] = {
    aten.conv1d.default: _transposed_convolution,
    aten.conv2d.default: _transposed_convolution,
    aten.conv3d.default: _transposed_convolution,
    aten.linear.default: _transposed_linear,
    aten.addmm.default: _transposed_addmm,
    aten.slice.Tensor: _placed(aten.slice.Tensor),
    aten.select.int: _placed(aten.select.int),
}
_OPERAND: dict[object, int] = {aten.addmm.default: 1}

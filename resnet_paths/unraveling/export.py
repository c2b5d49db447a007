"""A module as an exported program, its sizes as free as possible.

`torch.export` reasons about every size that is not fixed. For most models that takes as long as the rest of the export,
or less; for some (windows of a padded image, as in Swin) minutes or hours, which is given up early.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import sympy
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from resnet_paths.unraveling.sizes import expression

__all__ = ["export", "has_free_sizes", "quiet"]

_MOST_OPERATIONS = 12
_SECONDS, _SECONDS_PER_MODULE = 20.0, 0.3


class SizesTooInvolved(Exception):  # noqa: N818 - no error: it ends an attempt
    """Reasoning about free sizes would take too long."""


class _Limited(TorchFunctionMode):
    """Ends an export whose sizes become too involved, or that takes too long.

    Args:
        seconds: The most seconds that this thread may compute, whatever else the machine does.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.deadline = time.thread_time() + seconds

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Iterable[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        returned = func(*args, **(kwargs or {}))
        # What is too involved is known from the sizes, on machines of any speed: Swin's are after its first window.
        tensors = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
        sizes = (expression(size) for tensor in tensors for size in tensor.shape)
        involved = (factor.count_ops() > _MOST_OPERATIONS for size in sizes for factor in sympy.Mul.make_args(size))
        if any(involved) or time.thread_time() > self.deadline:
            raise SizesTooInvolved
        return returned


def has_free_sizes(inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether inputs have sizes other than the batch that could be left free."""
    return any(size > 1 for x in inputs for size in x.shape[1:])


def export(model: nn.Module, inputs: tuple[torch.Tensor, ...], *, free_sizes: bool) -> torch.export.ExportedProgram:
    """Export a module for any batch size.

    Args:
        model: The module.
        inputs: Example tensors, the batch in dimension 0.
        free_sizes: Whether sizes other than the batch are left free, as far as the model's code does.

    Returns:
        The program; nothing of the module is copied or changed.

    Raises:
        UserError: Or whatever else `torch.export` raises; `SizesTooInvolved` if it would take too long.
    """
    batch = max((x.shape[0] for x in inputs if x.dim()), default=1)
    # A batch of one would be traced as if it were the number 1.
    example = tuple(torch.cat([x, x]) if x.dim() and batch == 1 else x for x in inputs)
    seconds = _SECONDS + _SECONDS_PER_MODULE * sum(1 for _ in model.modules())
    limit = _Limited(seconds) if free_sizes else contextlib.nullcontext()
    with torch.no_grad(), quiet(), limit:
        # One size for the batch of all inputs, if there are several.
        rows = [x.shape[0] for x in example if x.dim()]
        if rows.count(max(rows, default=1)) > 1:
            try:
                return _exported(model, example, torch.export.Dim("batch"), free_sizes=free_sizes)
            except torch._dynamo.exc.UserError:
                # Inputs with as many rows as others, but not of the same batch.
                if free_sizes:
                    raise
        return _exported(model, example, torch.export.Dim.AUTO, free_sizes=free_sizes)


def _exported(
    model: nn.Module, example: tuple[torch.Tensor, ...], batch: object, *, free_sizes: bool
) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    rows = max((x.shape[0] for x in example if x.dim()), default=1)
    # One row for all examples, such as positions, stays one.
    dynamic: tuple[object, ...] = tuple(
        {
            dim: batch if dim == 0 and size == rows else auto
            for dim, size in enumerate(x.shape)
            if size > 1 and (dim == 0 or free_sizes)
        }
        for x in example
    )
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values()):
        dynamic = (dynamic,)
    return torch.export.export(model, example, dynamic_shapes=dynamic, strict=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter from printing the whole graph when it fails: the error says what is needed."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.disabled = was_disabled

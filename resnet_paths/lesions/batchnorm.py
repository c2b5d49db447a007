"""BatchNorm statistics estimated again for a lesioned network, without a copy of any weight.

Every way to run BatchNorm in eval mode, by a module or by an exported operation, ends in one of a few operations of
ATen. They are intercepted as they are dispatched, and given other statistics. The statistics of a step are a list of
(mean, variance), one for each BatchNorm operation in the order in which they run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["averaged_statistics", "batch_statistics", "given_statistics"]

Statistics = list[tuple[torch.Tensor, torch.Tensor]]

_NORMS = {
    "aten::batch_norm",
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::_native_batch_norm_legit_no_training",
}


@contextlib.contextmanager
def batch_statistics() -> Iterator[Statistics]:
    """A context in which each BatchNorm normalises by its input's own statistics.

    Yields:
        A list to which each operation appends its input's mean and unbiased variance.
    """
    found: Statistics = []

    def measure(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        count = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x.float() if x.dtype.itemsize < 4 else x, dims, correction=0)
        found.append((mean, variance * (count / max(count - 1, 1))))
        return mean, variance

    with _ReplacedStatistics(measure):
        yield found


@contextlib.contextmanager
def given_statistics(statistics: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """A context in which the BatchNorm operations normalise by `statistics`, one after the other."""
    waiting = iter(statistics)
    with _ReplacedStatistics(lambda _: next(waiting)):
        yield


def averaged_statistics(average: Statistics, num_batches: int, new: Statistics) -> Statistics:
    """The mean over batches, as torch keeps it with ``momentum=None``.

    Args:
        average: The mean over `num_batches` batches.
        num_batches: How many batches have been averaged.
        new: Statistics of one more batch.

    Returns:
        The mean over all of them.
    """
    if not num_batches:
        return new
    weight = 1 / (num_batches + 1)
    pairs = zip(average, new, strict=True)
    return [(mean + (m - mean) * weight, variance + (v - variance) * weight) for (mean, variance), (m, v) in pairs]


class _ReplacedStatistics(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """BatchNorm operations run with the (mean, variance) that a function gives for their input."""

    def __init__(self, statistics_for: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.statistics_for = statistics_for

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """The operation, with other statistics if it is a BatchNorm."""
        kwargs = dict(kwargs or {})
        if func._schema.name not in _NORMS:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        mean, variance = self.statistics_for(given["input"])
        dtype = given["input"].dtype if given.get("running_mean") is None else given["running_mean"].dtype
        given |= {"running_mean": mean.to(dtype), "running_var": variance.to(dtype)}
        return func(**given)

"""BatchNorm statistics taken anew for a lesioned network, without a copy of any weight.

Every way to run BatchNorm in eval mode, by a module or by an exported operation, ends in one of a few operations of
ATen. They are caught as they are dispatched, and given other statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Statistics"]

_NORMS = {
    "aten::batch_norm",
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::_native_batch_norm_legit_no_training",
}


class Statistics:
    """Means and variances of the BatchNorm operations of one step, in the order in which they run.

    The mean over batches of each batch's mean and unbiased variance, as torch keeps them with ``momentum=None``.
    """

    def __init__(self) -> None:
        self.means: list[torch.Tensor] = []
        self.variances: list[torch.Tensor] = []
        self.num_batches = 0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """While it lasts, each operation normalises by its input's own statistics, which are kept."""
        means: list[torch.Tensor] = []
        variances: list[torch.Tensor] = []

        def measure(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            dims = [dim for dim in range(x.dim()) if dim != 1]
            count = x.numel() // x.shape[1]
            variance, mean = torch.var_mean(x.float() if x.dtype.itemsize < 4 else x, dims, correction=0)
            means.append(mean)
            variances.append(variance * (count / max(count - 1, 1)))
            return mean, variance

        with _Replaced(measure):
            yield
        new = 1 / (self.num_batches + 1)
        self.means = [old + (m - old) * new for old, m in zip(self.means or means, means, strict=True)]
        self.variances = [old + (v - old) * new for old, v in zip(self.variances or variances, variances, strict=True)]
        self.num_batches += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, each operation normalises by the statistics kept."""
        kept = iter(list(zip(self.means, self.variances, strict=True)))
        with _Replaced(lambda _: next(kept)):
            yield


class _Replaced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """BatchNorm operations run with the (mean, variance) that a function gives for their input."""

    def __init__(self, statistics_for: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.statistics_for = statistics_for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, with other statistics if it is a BatchNorm."""
        kwargs = kwargs or {}
        if func._schema.name not in _NORMS:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        mean, variance = self.statistics_for(given["input"])
        dtype = given["input"].dtype if given.get("running_mean") is None else given["running_mean"].dtype
        given |= {"running_mean": mean.to(dtype), "running_var": variance.to(dtype)}
        return func(**given)

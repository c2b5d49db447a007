"""Examples in, means over them out: what every instrument that measures single examples begins and ends with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from resnet_paths.errors import ResnetPathsError

__all__ = ["batches_of", "mean_over_examples"]


def batches_of(inputs: Any, targets: Any) -> Iterable[tuple[Any, Any]]:
    """Batches of (inputs, targets), from a single one or a loader.

    Args:
        inputs: A tensor, a tuple of tensors, or an iterable of (inputs, targets).
        targets: What belongs to a single batch; None with a loader.

    Yields:
        (Inputs, targets) of each batch.

    Raises:
        ResnetPathsError: If there is no batch, or one is no such pair.
    """
    if isinstance(inputs, torch.Tensor) or (
        inputs and isinstance(inputs, tuple) and isinstance(inputs[0], torch.Tensor)
    ):
        yield inputs, targets
        return
    if targets is not None:
        raise ResnetPathsError("targets", type(targets).__name__, "None where inputs is a loader of (inputs, targets)")
    empty = True
    for batch in inputs if isinstance(inputs, Iterable) else []:
        empty = False
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ResnetPathsError("inputs", type(batch).__name__, "batches of (inputs, targets)")
        some = batch[0]
        yield tuple(some) if isinstance(some, list) else some, batch[1]
    if empty:
        raise ResnetPathsError(
            "inputs", type(inputs).__name__, "a tensor, a tuple of tensors, or a loader with a batch"
        )


def mean_over_examples(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its standard error over the last dimension, NaN left out.

    Args:
        values: Numbers [..., measurement].

    Returns:
        Mean and standard error [...]; the error of a single value is NaN.
    """
    known = np.isfinite(values)
    num = known.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(-1) / num
        squares = np.where(known, values - mean[..., None], 0) ** 2
        return mean, np.sqrt(squares.sum(-1) / (num - 1) / num)

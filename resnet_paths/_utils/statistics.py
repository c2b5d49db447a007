"""Means and standard errors over examples."""

from __future__ import annotations

import numpy as np

__all__ = ["mean_over_examples"]


def mean_over_examples(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its standard error over the last dimension, ignoring NaN.

    Args:
        values: Array [..., measurement].

    Returns:
        Mean and standard error [...]; the error of a single value is NaN.
    """
    known = np.isfinite(values)
    num = known.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(-1) / num
        squares = np.where(known, values - mean[..., None], 0) ** 2
        return mean, np.sqrt(squares.sum(-1) / (num - 1) / num)

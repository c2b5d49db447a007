"""What the lesions of a study do on each batch, and the statistics of all batches. The intervals are those of scipy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["BatchResult", "counts_of_batch", "rows_of_study", "validate_logits"]

_NORMAL_975 = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class BatchResult:
    """What lesions did on one batch: what an executor returns and the store keeps.

    Attributes:
        wrong: Which images each lesion gets wrong, those with logits that are not finite included; bool
            [lesion, example].
        loss_sum: Sum of the cross-entropy over the batch in nats, [lesion].
        num_not_finite: Images with logits that are not finite, [lesion].
    """

    wrong: np.ndarray[Any, Any]
    loss_sum: np.ndarray[Any, Any]
    num_not_finite: np.ndarray[Any, Any]

    def row(self, index: int) -> BatchResult:
        """The result of one lesion."""
        one = slice(index, index + 1)
        return BatchResult(self.wrong[one], self.loss_sum[one], self.num_not_finite[one])

    @staticmethod
    def joined(results: Sequence[BatchResult], axis: int = 0) -> BatchResult:
        """Results of different lesions (axis 0) or of different examples (axis 1) as one."""
        counts = [(r.loss_sum, r.num_not_finite) for r in results]
        losses, not_finite = (np.concatenate(c) if axis == 0 else np.sum(c, axis=0) for c in zip(*counts, strict=True))
        return BatchResult(np.concatenate([r.wrong for r in results], axis=axis), losses, not_finite)


def counts_of_batch(labels: np.ndarray[Any, Any], result: BatchResult, *, per_class: bool) -> dict[str, Any]:
    """What the statistics of a study need of a batch.

    Args:
        labels: [batch].
        result: What all lesions did on it; row 0 is the intact network.
        per_class: Whether to count each class too.

    Returns:
        Counts by name, each a number or one entry per lesion.
    """
    intact = result.wrong[0]
    counts: dict[str, Any] = {
        "num_examples": len(labels),
        "wrong": result.wrong.sum(1),
        "newly_wrong": (result.wrong & ~intact).sum(1),
        "newly_right": (~result.wrong & intact).sum(1),
        "loss_sum": result.loss_sum,
        "num_not_finite": result.num_not_finite,
    }
    if per_class:
        one_hot = labels[:, None] == np.arange(labels.max() + 1)
        counts |= {"of_class": one_hot.sum(0), "wrong_of_class": result.wrong.astype(np.int64) @ one_hot}
    return counts


def rows_of_study(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Columns of the study's frame for each lesion, the intact network first.

    Args:
        batches: From `counts_of_batch`, in the order in which they are summed; at least one.

    Returns:
        One dictionary per lesion.
    """
    n = sum(batch["num_examples"] for batch in batches)
    names = ("wrong", "newly_wrong", "newly_right", "loss_sum", "num_not_finite")
    sums = {name: np.sum([batch[name] for batch in batches], axis=0) for name in names}
    rows = [_row(n, {name: values[i] for name, values in sums.items()}) for i in range(len(sums["wrong"]))]
    if "of_class" in batches[0]:
        num_classes = max(len(batch["of_class"]) for batch in batches)
        of_class, wrong = (
            np.sum([_padded(batch[name], num_classes) for batch in batches], axis=0)
            for name in ("of_class", "wrong_of_class")
        )
        for row, wrong_of_lesion in zip(rows, wrong, strict=True):
            row["num_examples_per_class"] = tuple(of_class.tolist())
            row["num_wrong_per_class"] = tuple(wrong_of_lesion.tolist())
    for row in rows:
        row["intact_error_rate"] = rows[0]["error_rate"]
    return rows


def _row(n: int, sums: dict[str, Any]) -> dict[str, Any]:
    num_wrong = int(sums["wrong"])
    interval = stats.binomtest(num_wrong, n).proportion_ci(method="wilson")
    up, down = int(sums["newly_wrong"]) / n, int(sums["newly_right"]) / n
    increase = up - down
    # Each image changes by -1, 0 or 1: the variance of the paired difference is (up + down) - increase^2.
    half_width = _NORMAL_975 * max(up + down - increase**2, 0.0) ** 0.5 / n**0.5
    return {
        "error_rate": num_wrong / n,
        "error_rate_low": float(interval.low),
        "error_rate_high": float(interval.high),
        "error_increase": increase,
        "error_increase_low": increase - half_width,
        "error_increase_high": increase + half_width,
        "loss": float(sums["loss_sum"]) / n,
        "num_not_finite": int(sums["num_not_finite"]),
        "num_examples": n,
    }


def _padded(counts: np.ndarray[Any, Any], num_classes: int) -> np.ndarray[Any, Any]:
    """Counts by class in the last dimension, with zeros for the classes that a batch does not contain."""
    return np.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, num_classes - counts.shape[-1])])


def validate_logits(logits: Any, labels: torch.Tensor) -> None:
    """Validate logits and labels.

    Args:
        logits: What a chain returned, [batch, class].
        labels: Class indices [batch].

    Raises:
        ResnetPathsError: If the logits are not a tensor [batch, class], or the labels are not among their classes.
    """
    if not isinstance(logits, torch.Tensor):
        raise ResnetPathsError("chain", f"a chain that returns a {type(logits).__name__}", "logits [batch, class]")
    if logits.dim() != 2 or len(logits) != len(labels):
        raise ResnetPathsError(
            "loader", f"labels {list(labels.shape)} for logits {list(logits.shape)}", "one label per row of logits"
        )
    if labels.is_floating_point() or labels.dim() != 1:
        raise ResnetPathsError("labels", f"{labels.dtype} {list(labels.shape)}", "class indices, integers [batch]")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise ResnetPathsError(
            "labels", [int(labels.min()), int(labels.max())], f"class indices from 0 to {logits.shape[1] - 1}"
        )

"""From which images each lesion gets wrong to error rates with intervals. The intervals are scipy's."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from resnet_paths.lesions.pieces import Piece

__all__ = ["Tally"]

_NORMAL_975 = float(stats.norm.ppf(0.975))


class Tally:
    """Counts over the batches of a study. Row 0 of every piece is the intact network.

    Args:
        num_lesions: Rows of a piece.
        per_class: Whether rows hold counts for each class too.
    """

    def __init__(self, num_lesions: int, *, per_class: bool) -> None:
        self.num_lesions = num_lesions
        self.per_class = per_class
        self._batches: dict[int, dict[str, Any]] = {}

    @property
    def num_batches(self) -> int:
        """How many batches were added."""
        return len(self._batches)

    def add(self, number: int, labels: np.ndarray[Any, Any], piece: Piece) -> None:
        """Take in a batch; batches may come in any order.

        Args:
            number: The batch's place in the loader: sums are taken in this order, whoever finished first.
            labels: [batch].
            piece: What all lesions did on it.
        """
        intact = piece.wrong[0]
        counts: dict[str, Any] = {
            "num_examples": len(labels),
            "wrong": piece.wrong.sum(1),
            "newly_wrong": (piece.wrong & ~intact).sum(1),
            "newly_right": (~piece.wrong & intact).sum(1),
            "loss_sum": piece.loss_sum,
            "num_not_finite": piece.num_not_finite,
        }
        if self.per_class:
            one_hot = labels[:, None] == np.arange(labels.max() + 1)
            counts |= {"of_class": one_hot.sum(0), "wrong_of_class": piece.wrong.astype(np.int64) @ one_hot}
        self._batches[number] = counts

    def rows(self) -> list[dict[str, Any]]:
        """Columns of the study's frame for each lesion, the intact network first."""
        batches = [self._batches[number] for number in sorted(self._batches)]
        n = sum(batch["num_examples"] for batch in batches)
        names = ("wrong", "newly_wrong", "newly_right", "loss_sum", "num_not_finite")
        sums = {name: np.sum([batch[name] for batch in batches], axis=0) for name in names}
        rows = [self._row(n, {name: values[i] for name, values in sums.items()}) for i in range(self.num_lesions)]
        if self.per_class:
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

    @staticmethod
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
    """Counts by class in the last dimension, with zeros for the classes that a batch does not reach."""
    return np.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, num_classes - counts.shape[-1])])

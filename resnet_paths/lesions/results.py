"""What the lesions of a study do on each batch, and the numbers and intervals over all batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from resnet_paths._utils.statistics import (
    Estimate,
    adjusted_p_values,
    paired_rate_interval,
    rate_interval,
    studentised_interval,
)
from resnet_paths.lesions.measures import Measure, Outcome, not_finite

__all__ = ["BatchResult", "Evaluation", "rows_of_study"]

_NOT_FINITE = "not finite"


@dataclass(frozen=True)
class BatchResult:
    """What lesions did on one batch: what an executor returns and the store keeps.

    Attributes:
        sums: By statistic, what each example adds up, [lesion, example, sum]; under ``"not finite"`` whether any of its
            outputs was not.
    """

    sums: Mapping[str, np.ndarray]

    def row(self, index: int) -> BatchResult:
        """The result of one lesion."""
        return BatchResult({name: values[index : index + 1] for name, values in self.sums.items()})

    @staticmethod
    def joined(results: Sequence[BatchResult], axis: int = 0) -> BatchResult:
        """Results of different lesions (axis 0) or of different examples (axis 1) as one."""
        names = results[0].sums
        return BatchResult({name: np.concatenate([r.sums[name] for r in results], axis) for name in names})


class Evaluation:
    """Takes the sums of every statistic, one lesion after the other, and keeps nothing else.

    Args:
        measures: What is measured; statistics that several measures read are taken once.
        labels: Labels of the batch; None for a batch without labels.
        counts: As in `Outcome`.
        num_rows: How many lesions.
    """

    def __init__(
        self, measures: Sequence[Measure], labels: torch.Tensor | None, counts: torch.Tensor | None, num_rows: int
    ) -> None:
        self.measures = {measure.statistic: measure for measure in measures}
        self.labels, self.counts, self.num_rows = labels, counts, num_rows
        self.intact: Any = None
        # In one place from the start: small tensors between large ones would keep the memory of these from being used
        # again.
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, row: int, outputs: Any) -> None:
        """Take the sums of one lesion."""
        outcome = Outcome(outputs, self.labels, self.intact, self.counts)
        self._keep(_NOT_FINITE, row, not_finite(outcome))
        for name, measure in self.measures.items():
            self._keep(name, row, measure.sums(outcome))

    def result(self) -> BatchResult:
        """All rows; the device is waited for here."""
        return BatchResult({name: sums.cpu().numpy() for name, sums in self._sums.items()})

    def _keep(self, name: str, row: int, sums: torch.Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = sums.new_zeros(self.num_rows, *sums.shape)
        self._sums[name][row] = sums


def rows_of_study(
    results: Sequence[BatchResult],
    measures: Sequence[Measure],
    *,
    adjust: str | None = None,
    per_example: bool = False,
    classes: np.ndarray | None = None,
) -> list[dict[str, object]]:
    """Columns of the study's frame for each lesion, the intact network first.

    Args:
        results: Of each batch, in the order in which they are summed; at least one.
        measures: What was measured.
        adjust: As for `resnet_paths.lesion_study`.
        per_example: Likewise.
        classes: Class of each example, where each class is to be counted.

    Returns:
        One dictionary per lesion.
    """
    spoilt = np.concatenate([result.sums[_NOT_FINITE] for result in results], 1)[..., 0]
    rows: list[dict[str, object]] = [{} for _ in spoilt]
    for measure in measures:
        sums = np.concatenate([result.sums[measure.statistic] for result in results], 1)
        columns = list(_columns(measure, sums))
        if adjust is not None:
            # The intact network is no hypothesis.
            p_values = adjusted_p_values(np.array([of["p"] for of in columns])[1:], adjust)
            for of, p_value in zip(columns, [math.nan, *p_values], strict=True):
                of[f"{measure.name}_increase_p"] = float(p_value)
        values = _values(measure, torch.from_numpy(sums).double()).numpy() if per_example else None
        for index, (row, of) in enumerate(zip(rows, columns, strict=True)):
            row |= {name: value for name, value in of.items() if name != "p"}
            if values is not None:
                row[f"{measure.name}_per_example"] = values[index]
                row[f"intact_{measure.name}_per_example"] = values[0]
        if measure.statistic == "error_rate" and classes is not None:
            for row, of_lesion in zip(rows, sums, strict=True):
                row |= _counts_of_classes(of_lesion, classes)
    for row, num in zip(rows, spoilt.sum(1), strict=True):
        row |= {"num_not_finite": int(num), "num_examples": spoilt.shape[1]}
    return rows


def _columns(measure: Measure, sums: np.ndarray) -> Iterator[dict[str, object]]:
    """Of one measure, for each lesion; under ``"p"`` the p-value of no increase."""
    name = measure.name
    values, influences = _values_and_influences(measure, sums[0])
    intact_value, intact_influences = values[-1], influences[-1]
    for of_lesion in sums:
        values, influences = _values_and_influences(measure, of_lesion)
        if measure.is_rate:
            own = rate_interval(of_lesion[:, 0], of_lesion[:, 1])
            change = paired_rate_interval(of_lesion[:, 0].astype(np.float64) - sums[0][:, 0], of_lesion[:, 1])
        else:
            some = (of_lesion != 0).any(1) | (sums[0] != 0).any(1)  # others have no items
            own = _linked(measure, studentised_interval(values[0], influences[0][some]))
            change = studentised_interval(values[-1] - intact_value, (influences[-1] - intact_influences)[some])
        yield {
            name: values[-1],
            f"{name}_low": own.low,
            f"{name}_high": own.high,
            f"{name}_increase": values[-1] - intact_value,
            f"{name}_increase_low": change.low,
            f"{name}_increase_high": change.high,
            f"intact_{name}": intact_value,
            "p": change.p_value,
        }


def _values_and_influences(measure: Measure, sums: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """The number before and after its link, and to first order what each example adds to both."""
    # A number that stays the same where all sums are multiplied by one factor has influences that sum up to 0: they are
    # the gradient times the sums of each example.
    of_examples = torch.from_numpy(sums).double()
    total = of_examples.sum(0)
    with torch.inference_mode(False), torch.enable_grad():
        total = total.clone().requires_grad_()
        value = measure.value(total)
        shown = value if measure.link is None else measure.link(value)
        gradients = [torch.autograd.grad(number, total, retain_graph=True)[0] for number in (value, shown)]
    return [value.item(), shown.item()], [(of_examples @ gradient).numpy() for gradient in gradients]


def _linked(measure: Measure, interval: Estimate) -> Estimate:
    if measure.link is None:
        return interval
    low, high = measure.link(torch.tensor(interval[:2], dtype=torch.float64)).tolist()
    return interval._replace(low=low, high=high)


def _values(measure: Measure, sums: torch.Tensor) -> torch.Tensor:
    value = measure.value(sums)
    return value if measure.link is None else measure.link(value)


def _counts_of_classes(sums: np.ndarray, classes: np.ndarray) -> dict[str, tuple[int, ...]]:
    counts = {"num_examples_per_class": None, "num_wrong_per_class": sums[:, 0]}
    size = int(classes.max()) + 1
    return {
        name: tuple(np.bincount(classes, weights, size).astype(np.int64).tolist()) for name, weights in counts.items()
    }

"""What the lesions of a study do on each batch, and the numbers and intervals over all batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch

from resnet_paths._utils.statistics import (
    Estimate,
    adjusted_p_values,
    paired_rate_interval,
    rate_interval,
    studentised_interval,
)
from resnet_paths.lesions.measures import Measure, not_finite

__all__ = ["Sums", "joined", "rows_of", "rows_of_study", "sums_of"]

_NOT_FINITE = "not finite"


Sums: TypeAlias = dict[str, np.ndarray]
"""What lesions did on one batch, which is what an executor returns and the store keeps: by statistic what each example
adds up, [lesion, example, sum]; under ``"not finite"`` whether any of its outputs was not."""


def rows_of(sums: Sums, lesions: Sequence[int]) -> Sums:
    """The sums of some lesions.

    Args:
        sums: Of some lesions.
        lesions: Which of them.

    Returns:
        Their sums, in this order.
    """
    return {name: values[lesions] for name, values in sums.items()}


def joined(parts: Sequence[Sums], axis: int = 0) -> Sums:
    """Sums of different lesions (axis 0) or of different examples (axis 1) as one."""
    return {name: np.concatenate([part[name] for part in parts], axis) for name in parts[0]}


def sums_of(
    measures: Sequence[Measure],
    outputs: torch.Tensor,
    labels: torch.Tensor | None,
    intact: torch.Tensor | None,
    counts: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The sums of each example [example, sum] for one network; those that several measures read are taken once.

    Args:
        measures: What is measured.
        outputs: What the network returned, [batch, ...].
        labels: Labels [batch, ...]; None for a batch without labels.
        intact: What the intact network returned; None where no measure reads it.
        counts: Which items count, bool [batch, ...]; None where all do.

    Returns:
        By statistic, as in `Sums`.
    """
    functions = {measure.statistic: measure.sums for measure in measures}
    taken = {name: function(outputs, labels, intact, counts) for name, function in functions.items()}
    return {_NOT_FINITE: not_finite(outputs, counts), **taken}


def rows_of_study(
    results: Sequence[Sums],
    measures: Sequence[Measure],
    *,
    adjust: str | None = None,
    per_example: bool = False,
    classes: np.ndarray | None = None,
    level: float = 0.95,
) -> list[dict[str, object]]:
    """Columns of the study's frame for each lesion, the intact network first.

    Args:
        results: Of each batch, in the order in which they are summed; at least one.
        measures: What was measured.
        adjust: As for `resnet_paths.lesion_study`.
        per_example: Likewise.
        classes: Class of each example, where each class is to be counted.
        level: Confidence level of intervals.

    Returns:
        One dictionary per lesion.
    """
    spoilt = np.concatenate([result[_NOT_FINITE] for result in results], 1)[..., 0]
    rows: list[dict[str, object]] = [{} for _ in spoilt]
    for measure in measures:
        sums = np.concatenate([result[measure.statistic] for result in results], 1)
        columns = list(_columns(measure, sums, level))
        if adjust is not None:
            # The intact network is no hypothesis.
            p_values = adjusted_p_values(np.array([of["p"] for of in columns])[1:], adjust)
            for of, p_value in zip(columns, [math.nan, *p_values], strict=True):
                of[f"{measure.name}_increase_p"] = float(p_value)
        values = influences = None
        if per_example:
            values, influences = _values(measure, torch.from_numpy(sums).double()).numpy(), _influences(measure, sums)
        for index, (row, of) in enumerate(zip(rows, columns, strict=True)):
            row |= {name: value for name, value in of.items() if name != "p"}
            if values is not None and influences is not None:
                row[f"{measure.name}_per_example"] = values[index]
                row[f"{measure.name}_influences"] = influences[index]
                row[f"intact_{measure.name}_per_example"] = values[0]
                row[f"intact_{measure.name}_influences"] = influences[0]
        if measure.statistic == "error_rate" and classes is not None:
            for row, of_lesion in zip(rows, sums, strict=True):
                row |= _counts_of_classes(of_lesion, classes)
    for row, num in zip(rows, spoilt.sum(1), strict=True):
        row |= {"num_not_finite": int(num), "num_examples": spoilt.shape[1]}
    return rows


def _columns(measure: Measure, sums: np.ndarray, level: float) -> Iterator[dict[str, object]]:
    """Of one measure, for each lesion; under ``"p"`` the p-value of no increase."""
    name = measure.name
    (values, slopes), (shown, shown_slopes) = _values_and_gradients(measure, sums)
    # A number that stays the same where all sums are multiplied by one factor has influences that sum up to 0: they are
    # its gradient times the sums of each example.
    intact_influences = sums[0].astype(np.float64) @ shown_slopes[0]
    for row, of_lesion in enumerate(sums):
        increase = shown[row] - shown[0]
        if measure.is_rate:
            own = rate_interval(of_lesion[:, 0], of_lesion[:, 1], level)
            change = paired_rate_interval(of_lesion[:, 0].astype(np.float64) - sums[0][:, 0], of_lesion[:, 1], level)
        else:
            some = (of_lesion != 0).any(1) | (sums[0] != 0).any(1)  # others have no items
            exact = of_lesion.astype(np.float64)
            own = _linked(measure, studentised_interval(values[row], (exact @ slopes[row])[some], level))
            change = studentised_interval(increase, (exact @ shown_slopes[row] - intact_influences)[some], level)
        yield {
            name: shown[row],
            f"{name}_low": own.low,
            f"{name}_high": own.high,
            f"{name}_increase": increase,
            f"{name}_increase_low": change.low,
            f"{name}_increase_high": change.high,
            f"intact_{name}": shown[0],
            "p": change.p_value,
        }


def _values_and_gradients(measure: Measure, sums: np.ndarray) -> list[tuple[list[float], np.ndarray]]:
    """The numbers before and after their link, [lesion], and their gradients at the sums over examples."""
    totals = torch.from_numpy(sums).sum(1, dtype=torch.float64)
    with torch.inference_mode(False), torch.enable_grad():
        totals = totals.clone().requires_grad_()
        value = measure.value(totals)
        numbers = [value, value if measure.link is None else measure.link(value)]
        # Those of a lesion depend on its own sums alone.
        gradients = [torch.autograd.grad(number.sum(), totals, retain_graph=True)[0] for number in numbers]
    return [(number.tolist(), gradient.numpy()) for number, gradient in zip(numbers, gradients, strict=True)]


def _influences(measure: Measure, sums: np.ndarray) -> np.ndarray:
    """What each example adds to the number that is shown, to first order, [lesion, example]."""
    _, (_, slopes) = _values_and_gradients(measure, sums)
    influences: np.ndarray = np.einsum("les,ls->le", sums, slopes)
    return influences


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

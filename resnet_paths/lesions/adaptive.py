"""Studies that measure each lesion on as many examples as its interval needs.

After some batches, the looks, the interval of each lesion is computed, and lesions whose interval is narrow enough are
not measured further. An interval that may be reported at any of several looks has to be wider than one of a fixed
number of examples: the error rate alpha = 0.05 is spent over the looks, as in a group-sequential trial. Intervals are
repeated confidence intervals (Jennison and Turnbull 1989) with the bounds of Lan and DeMets (1983) for their spending
function of Pocock's type, ``alpha * log(1 + (e - 1) * t)`` at the share t of the examples.

The 54 single deletions of the shipped preact-resnet-110, at a half-width of one point of test error: 122,300 images in
place of 540,000, 4.4 times fewer (batches of 100 of the 10,000 shuffled test images). In simulations of 1,000 lesions
each, with 0 to 30 % of the predictions changed, 98.7 % or more of the intervals held the truth where studies stopped:
what is left of alpha when they stop is not spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from resnet_paths._utils.arguments import require_float
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.lesions.measures import Measure
from resnet_paths.lesions.results import Sums, rows_of, rows_of_study

__all__ = ["Precision", "levels_of_looks", "narrow_lesions", "rows_of_adaptive_study"]

_ALPHA = 0.05
_FEWEST_EXAMPLES = 100  # for which the coverage of intervals is known


@dataclass(frozen=True)
class Precision:
    """The precision at which `resnet_paths.lesion_study` stops measuring a lesion.

    Attributes:
        half_width: Half the width of the 95 % interval of the increase over the intact chain, such as 0.01 for one
            percentage point of error.
        measure: Name of the measure; None for the first of the study.

    Raises:
        ResnetPathsError: If the half-width is not a positive number.

    Example:
        >>> Precision(0.01)
        Precision(half_width=0.01, measure=None)
    """

    half_width: float
    measure: str | None = None

    def __post_init__(self) -> None:
        """Validate the half-width."""
        allowed = "a positive number, such as 0.01 for a percentage point"
        if require_float("half_width", self.half_width, allowed) <= 0:
            raise ResnetPathsError("half_width", self.half_width, allowed)

    def measure_among(self, measures: Sequence[Measure]) -> Measure:
        """The measure of a study whose interval is meant."""
        found = [measure for measure in measures if self.measure in (None, measure.name)]
        if not found:
            names = ", ".join(repr(measure.name) for measure in measures)
            raise ResnetPathsError("stop_when", self.measure, f"a measure of the study: {names}")
        return found[0]


def levels_of_looks(num_batches: int) -> dict[int, float]:
    """Numbers of batches after which intervals are computed, and the confidence level of each interval.

    All intervals of a lesion together hold with a probability of 95 %, so that any of them may be reported.

    Args:
        num_batches: Batches of the whole study.

    Returns:
        From each number of batches to the level, at most 12 looks, with a factor of the square root of 2 between them.

    Example:
        >>> {look: round(level, 3) for look, level in levels_of_looks(4).items()}
        {1: 0.982, 2: 0.982, 3: 0.982, 4: 0.981}
    """
    looks = sorted({math.ceil(num_batches * 2 ** (-power / 2)) for power in range(12)})
    times = np.array(looks) / num_batches
    spent = _ALPHA * np.log1p((math.e - 1) * times)
    return {look: 1 - 2 * float(special.ndtr(-z)) for look, z in zip(looks, _bounds(times, spent), strict=True)}


def _bounds(times: np.ndarray, spent: np.ndarray) -> list[float]:
    """For each look the z at which a Brownian motion has left the bounds with the probability spent until then."""
    # The density of the paths that have not left is carried from look to look (Armitage, McPherson and Rowe 1969).
    bounds: list[float] = []
    grid, weights, density = np.zeros(1), np.ones(1), np.ones(1)
    before = used = 0.0
    for time, goal in zip(times.tolist(), spent.tolist(), strict=True):
        deviation = math.sqrt(time - before)

        def leaves(bound: float) -> float:  # at this look and not before
            tails = special.ndtr((grid - bound) / deviation) + special.ndtr((-bound - grid) / deviation)  # noqa: B023
            return float((weights * density * tails).sum())  # noqa: B023

        low, high = 0.0, 10 * math.sqrt(time)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if leaves(middle) > goal - used else (low, middle)
        bounds.append(high / math.sqrt(time))
        inside = np.linspace(-high, high, 401)
        steps = (inside[:, None] - grid) / deviation
        kernel = np.exp(-(steps**2) / 2) / (deviation * math.sqrt(2 * math.pi))
        density = kernel @ (weights * density)
        weights = np.full(401, inside[1] - inside[0])
        weights[[0, -1]] /= 2
        grid, before, used = inside, time, goal
    return bounds


def narrow_lesions(
    batches: Sequence[Sums], lesions: Sequence[int], precision: Precision, measures: Sequence[Measure], level: float
) -> list[int]:
    """Lesions whose increase is known well enough.

    Args:
        batches: Sums of the intact chain and of `lesions`, in this order, on each batch so far.
        lesions: Indices of the lesions.
        precision: What is well enough.
        measures: Those of the study.
        level: Confidence level of intervals.

    Returns:
        The indices of these lesions.
    """
    measure = precision.measure_among(measures)
    rows = rows_of_study(batches, [measure], level=level)
    if not lesions or int(str(rows[0]["num_examples"])) < _FEWEST_EXAMPLES:
        return []
    low, high = (np.array([row[f"{measure.name}_increase_{end}"] for row in rows[1:]]) for end in ("low", "high"))
    return [lesion for lesion, half in zip(lesions, (high - low) / 2, strict=True) if half <= precision.half_width]


def rows_of_adaptive_study(
    finished: Mapping[int, tuple[Sums, np.ndarray | None, bool]],
    measures: Sequence[Measure],
    stops: Sequence[tuple[float, float]],
    *,
    per_example: bool = False,
) -> list[dict[str, object]]:
    """Columns of the study's frame for each lesion over its own batches, the intact chain first.

    Args:
        finished: Of each batch the sums of the chains that were wanted, and the class of each example.
        measures: What was measured.
        stops: Of each lesion the number of batches after which it was not wanted any more, and the level of its
            intervals.
        per_example: As for `resnet_paths.lesion_study`.

    Returns:
        One dictionary per chain.
    """
    ends = [math.inf, *(end for end, _ in stops)]
    rows: dict[int, dict[str, object]] = {}
    for end, level in dict.fromkeys(stops):
        members = [0, *(index for index, stop in enumerate(stops, start=1) if stop == (end, level))]
        own, classes = [], []
        for number in sorted(n for n in finished if n < end):
            sums, of_batch, _ = finished[number]
            place = {index: row for row, index in enumerate(i for i, last in enumerate(ends) if last > number)}
            own.append(rows_of(sums, [place[index] for index in members]))
            classes.append(of_batch)
        known = [of_batch for of_batch in classes if of_batch is not None]
        of_members = rows_of_study(
            own, measures, per_example=per_example, classes=np.concatenate(known) if known else None, level=level
        )
        rows |= dict(zip(members, of_members, strict=True))
    return [rows[index] for index in range(len(ends))]

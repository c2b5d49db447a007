"""Findings: measured quantities with 95 % intervals, and what was predicted of them.

A notebook lists its findings in one cell and asserts them in the last: ``assert as_expected(findings), findings``. The
executed copy keeps them (`resnet_paths.reproduce.claims`), and ``resnet-paths findings`` makes the tables of the
documentation from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import rate_interval
from resnet_paths.reproduce.datasets import DATASETS

__all__ = [
    "UNDECIDED",
    "Finding",
    "as_expected",
    "findings_frame",
    "interval_text",
    "measured_text",
    "number_text",
    "on_dataset",
]

UNDECIDED = ("too small to tell", "no interval")
"""Verdicts of a sample that does not decide about a prediction."""

_EXPECTATIONS = ("agrees", "differs", "")
_INCLUDED = DATASETS["fashion-mnist"].title  # the data set of the results that are included with the project


@dataclass(frozen=True)
class Finding:
    """A measured quantity, its 95 % interval, and the range in which it was predicted to be.

    Attributes:
        quantity: What is measured, a noun phrase.
        estimate: Its value, in `unit`.
        interval: Ends of the 95 % interval; NaN where the sample is too small for one, None of an exact value.
        unit: Such as ``"%"``, ``"points"`` or ``"blocks"``.
        over: What the interval is over: ``"images"``, ``"seeds"``, ``"blocks"``, ``"sets of blocks"``.
        at_least: Lower end of the predicted range.
        at_most: Its upper end.
        expected: ``"agrees"``, ``"differs"`` where an earlier run refuted the prediction, or empty to accept either.
        networks: Names of the networks.
        seeds: Number of training runs.
        images: Number of examples.
        example: What an example is, in the singular: ``"image"``, or ``"window"`` of text.
        dataset: Name of the data set.
        source: Where the prediction was published, with the figure or section.
        larger_run: What a larger run would need to decide.
        headline: Whether the table of notebooks shows it.
    """

    quantity: str
    estimate: float
    interval: tuple[float, float] | None = None
    unit: str = ""
    over: str = ""
    at_least: float = -math.inf
    at_most: float = math.inf
    expected: str = "agrees"
    networks: str = ""
    seeds: int = 1
    images: int = 0
    example: str = "image"
    dataset: str = _INCLUDED
    source: str = ""
    larger_run: str = ""
    headline: bool = False

    def __post_init__(self) -> None:
        if self.expected not in _EXPECTATIONS:
            raise ResnetPathsError("expected", self.expected, " or ".join(map(repr, _EXPECTATIONS)))
        if not self.at_least <= self.at_most:
            raise ResnetPathsError("at_least", self.at_least, f"a number up to at_most, {self.at_most}")
        low, high = self.ends
        if low > high:
            raise ResnetPathsError("interval", self.interval, "a lower and an upper end")

    @classmethod
    def of_mean(cls, quantity: str, values: Iterable[float], **fields: Any) -> Finding:
        """Mean of a sample, with Student's t interval.

        Args:
            quantity: What is measured.
            values: One value per seed, group or block; the interval of fewer than three is NaN.
            **fields: Other attributes.

        Returns:
            The finding.

        Example:
            >>> Finding.of_mean("mean", [1.0, 2.0, 3.0], over="seeds").interval_text
            '-0.484 to 4.48, seeds'
        """
        sample = np.asarray(list(values), dtype=np.float64)
        half = stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample) if len(sample) > 2 else math.nan
        mean = float(sample.mean())
        return cls(quantity, mean, (mean - float(half), mean + float(half)), **fields)

    @classmethod
    def of_rate(cls, quantity: str, counts: Iterable[float], sizes: Iterable[int], **fields: Any) -> Finding:
        """A rate in percent, with Wilson's interval, which stays within 0 and 100 %.

        Args:
            quantity: What is measured.
            counts: How many items of each cluster have the property, such as crops of each photograph.
            sizes: Number of items of each cluster; with clusters the interval is that of the effective sample size.
            **fields: Other attributes.

        Returns:
            The finding.

        Example:
            >>> Finding.of_rate("right", [1] * 19 + [0], [1] * 20, over="photographs").interval_text
            '76.4 to 99.1, photographs'
        """
        counts, sizes = np.asarray(list(counts), dtype=np.float64), np.asarray(list(sizes), dtype=np.float64)
        found = rate_interval(counts, sizes)
        rate = float(counts.sum() / sizes.sum()) if sizes.sum() else math.nan
        return cls(quantity, 100 * rate, (100 * found.low, 100 * found.high), unit="%", **fields)

    @classmethod
    def of_sample(
        cls, quantity: str, statistic: Callable[..., float], *samples: Iterable[float], **fields: Any
    ) -> Finding:
        """A statistic of a sample, with a bootstrap interval (percentiles of 2,000 resamples, seeded).

        Args:
            quantity: What is measured.
            statistic: From one array per sample to a number, such as `numpy.median` or a rank correlation.
            *samples: One or more samples of equal size, resampled together.
            **fields: Other attributes.

        Returns:
            The finding; the interval of a single value is NaN.

        Example:
            >>> Finding.of_sample("median", np.median, range(101), over="blocks").interval_text
            '41 to 59, blocks'
        """
        arrays = [np.asarray(list(sample), dtype=np.float64) for sample in samples]
        estimate = float(statistic(*arrays))
        num = len(arrays[0])
        if num < 2:
            return cls(quantity, estimate, (math.nan, math.nan), **fields)
        # Not scipy.stats.bootstrap: its batches pass an axis, which rank correlations do not have.
        draws = np.random.default_rng(0).integers(num, size=(2_000, num))
        values = [float(statistic(*(array[chosen] for array in arrays))) for chosen in draws]
        low, high = np.nanquantile(values, (0.025, 0.975))
        return cls(quantity, estimate, (float(low), float(high)), **fields)

    @classmethod
    def of_table(
        cls, quantity: str, statistic: Callable[[np.ndarray], float], table: np.ndarray, **fields: Any
    ) -> Finding:
        """A statistic of row means, with a bootstrap interval over rows and columns.

        Both are resampled, such as sets of blocks and images, so that the interval holds for others of both.

        Args:
            quantity: What is measured.
            statistic: From the mean of each row to a number, such as `numpy.median`.
            table: One row per set and one column per image.
            **fields: Other attributes.

        Returns:
            The finding.

        Example:
            >>> table = np.add.outer(np.arange(20.0), np.arange(30.0) % 2)
            >>> Finding.of_table("median", np.median, table, over="sets and images").interval_text
            '5.97 to 14, sets and images'
        """
        generator = np.random.default_rng(0)
        table = np.asarray(table, dtype=np.float64)
        values = []
        for _ in range(2_000):
            rows, columns = (generator.integers(size, size=size) for size in table.shape)
            weights = np.bincount(columns, minlength=table.shape[1]) / table.shape[1]
            values.append(float(statistic(table[rows] @ weights)))
        low, high = np.quantile(values, (0.025, 0.975)) if min(table.shape) > 1 else (math.nan, math.nan)
        return cls(quantity, float(statistic(table.mean(1))), (float(low), float(high)), **fields)

    @property
    def ends(self) -> tuple[float, float]:
        """Ends of the interval; twice the estimate if it is exact."""
        return (self.estimate, self.estimate) if self.interval is None else self.interval

    @property
    def verdict(self) -> str:
        """``"agrees"`` if the interval is inside the predicted range, ``"differs"`` if it is outside.

        ``"too small to tell"`` if it is partly inside, ``"no interval"`` if it is not known; empty without a
        prediction.
        """
        if self.at_least == -math.inf and self.at_most == math.inf:
            return ""
        low, high = self.ends
        if math.isnan(low + high):
            return "no interval"
        if self.at_least <= low and high <= self.at_most:
            return "agrees"
        return "differs" if high < self.at_least or low > self.at_most else "too small to tell"

    @property
    def as_expected(self) -> bool:
        """Whether the interval does not exclude what was expected."""
        return not self.expected or self.verdict in ("", self.expected, *UNDECIDED)

    @property
    def prediction(self) -> str:
        """The predicted range, as in ``"at most 1 point"``; empty without one."""
        if number_text(self.at_least) == number_text(self.at_most):
            return measured_text(self.at_least, self.unit) if math.isfinite(self.at_least) else ""
        if self.at_least == -math.inf:
            return f"at most {measured_text(self.at_most, self.unit)}"
        if self.at_most == math.inf:
            return f"at least {measured_text(self.at_least, self.unit)}"
        return f"{number_text(self.at_least)} to {number_text(self.at_most)} {self.unit}".strip()

    @property
    def refuted_by(self) -> str:
        """Which measurement would refute the prediction; empty without one."""
        below = "" if self.at_least == -math.inf else f"below {number_text(self.at_least)}"
        above = "" if self.at_most == math.inf else f"above {number_text(self.at_most)}"
        ends = " or ".join(filter(None, (below, above)))
        return ends and f"{'another value:' if self.interval is None else 'an interval'} {ends}"

    @property
    def interval_text(self) -> str:
        """The interval and what it is over."""
        if self.interval is None:
            return "exact"
        return ", ".join(filter(None, (interval_text(*self.interval), self.over)))

    def __str__(self) -> str:
        measured = f"{self.quantity}: {measured_text(self.estimate, self.unit)} ({self.interval_text})"
        return f"{measured}; predicted {self.prediction}: {self.verdict}" if self.verdict else measured

    def to_dict(self) -> dict[str, object]:
        """Attributes with ``low``, ``high``, ``verdict`` and ``refuted_by``; what is not finite is None."""
        values = {key: value for key, value in asdict(self).items() if key != "interval"}
        low, high = (None, None) if self.interval is None else self.interval
        values |= {"low": low, "high": high, "exact": self.interval is None}
        values |= {"prediction": self.prediction, "verdict": self.verdict, "refuted_by": self.refuted_by}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def as_expected(findings: Sequence[Finding]) -> bool:
    """Whether no finding contradicts what was expected of it; without findings an error.

    Args:
        findings: The findings of a notebook.

    Returns:
        True, or False if an interval excludes what was expected.

    Raises:
        ResnetPathsError: If there are no findings.
    """
    if not findings:
        raise ResnetPathsError("findings", findings, "at least one finding")
    return all(finding.as_expected for finding in findings)


def on_dataset(findings: Sequence[Finding], dataset: str) -> list[Finding]:
    """The findings of a notebook whose parameter is a data set.

    Which predictions hold is known of the included results, which are of Fashion-MNIST. On another data set either
    verdict is accepted, so that a notebook does not fail because its results differ from those.

    Args:
        findings: The findings. Those with a data set of their own are returned as they are.
        dataset: Name of the data set on which the others were measured, such as ``"cifar-10"``.

    Returns:
        The findings, with the title of the data set.

    Example:
        >>> (finding,) = on_dataset([Finding("cost", 2.0, (1.5, 2.5), at_most=1)], "cifar-10")
        >>> finding.dataset, finding.verdict, as_expected([finding])
        ('CIFAR-10', 'differs', True)
    """
    title = DATASETS[dataset].title if dataset in DATASETS else dataset
    if title == _INCLUDED:
        return list(findings)
    return [
        replace(one, dataset=one.dataset.replace(_INCLUDED, title), expected="") if _INCLUDED in one.dataset else one
        for one in findings
    ]


def findings_frame(findings: Iterable[Finding]) -> pd.DataFrame:
    """The findings as a table of text, for a notebook.

    Args:
        findings: The findings of a notebook.

    Returns:
        One row per finding: estimate, interval, prediction and verdict.
    """
    return pd.DataFrame([
        {
            "finding": finding.quantity,
            "estimate": measured_text(finding.estimate, finding.unit),
            "95 % interval": finding.interval_text,
            "predicted": finding.prediction,
            "verdict": finding.verdict,
        }
        for finding in findings
    ]).set_index("finding")


def number_text(value: float) -> str:
    """A number with three significant digits, or all digits of a whole number.

    Args:
        value: The number.

    Returns:
        Its text.

    Example:
        >>> [number_text(value) for value in (0.12345, 12345.6, -1e-9, 2**30, 0.0)]
        ['0.123', '12,346', '-1e-09', '1,073,741,824', '0']
    """
    if not math.isfinite(value):
        return "not known"
    if abs(value) >= 1_000 or value == int(value):
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.3g}"


def measured_text(value: float, unit: str) -> str:
    """A number with its unit, in the singular if the number is 1.

    Args:
        value: The number.
        unit: Its unit in the plural, such as ``"blocks"``; empty for none.

    Returns:
        Its text.

    Example:
        >>> measured_text(2.0, "blocks"), measured_text(1.0, "blocks"), measured_text(1.0, "%"), measured_text(1.0, "")
        ('2 blocks', '1 block', '1 %', '1')
    """
    number = number_text(value)
    if number == "1":
        first, *rest = unit.split(" ")
        unit = " ".join([first.removesuffix("s"), *rest])
    return f"{number} {unit}".strip()


def interval_text(low: float, high: float) -> str:
    """An interval, as in ``"1 to 2"``.

    Args:
        low: Its lower end.
        high: Its upper end.

    Returns:
        Its text; ``"not known"`` of NaN.
    """
    return f"{number_text(low)} to {number_text(high)}" if math.isfinite(low + high) else "not known"

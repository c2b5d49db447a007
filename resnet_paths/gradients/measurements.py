"""What was measured on some examples, and the means and standard errors that a frame shows of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from resnet_paths._utils.statistics import binary_exponents, mean_over_examples
from resnet_paths.gradients.importance import Mean, PathDraws, WeightedNorms, mean_of

__all__ = ["Measurements"]


@dataclass
class Measurements:
    """What was measured on some examples; each array ends in the measurement, an example or a batch.

    Attributes:
        num_examples: How many examples they were.
        underflowed: Where a number that is not 0 stands as 0, [length].
        norms: Norms of the sums over paths, [length, measurement].
        shares: Their shares of the whole gradient, [length, measurement].
        whole: Norms of the whole gradient, [measurement].
        energies: Estimates of the sum over paths of squared norms, [length, measurement].
        energy_errors: Their standard errors due to the draws of signs, [length, measurement].
        by_draw: Norms of single paths, for each batch an array [length, draw, measurement].
        weighted: What weighted paths gave, for each batch a list over lengths.
        num_draws: Draws of signs or paths; the most of any length.
        num_path_vjps: Block VJPs of single paths.
    """

    num_examples: int
    underflowed: np.ndarray
    norms: np.ndarray | None = None
    shares: np.ndarray | None = None
    whole: np.ndarray | None = None
    energies: np.ndarray | None = None
    energy_errors: np.ndarray | None = None
    by_draw: list[np.ndarray] | None = None
    weighted: list[list[PathDraws]] | None = None
    num_draws: int = 0
    num_path_vjps: int = 0

    @classmethod
    def joined(cls, parts: Sequence[Measurements]) -> Measurements:
        """The measurements of several batches, or parts of one, as one."""

        def all_of(name: str) -> np.ndarray | None:
            arrays = [getattr(r, name) for r in parts]
            return None if arrays[0] is None else np.concatenate(arrays, -1)

        names = ("norms", "shares", "whole", "energies", "energy_errors")
        by_draw = [array for r in parts for array in r.by_draw or []]
        weighted = [lengths for r in parts for lengths in r.weighted or []]
        return cls(
            sum(r.num_examples for r in parts),
            np.any([r.underflowed for r in parts], axis=0),
            **{name: all_of(name) for name in names},
            by_draw=by_draw or None,
            weighted=weighted or None,
            num_draws=max(r.num_draws for r in parts),
            num_path_vjps=max(r.num_path_vjps for r in parts),
        )

    def beside(self, other: Measurements) -> Measurements:
        """What was measured on the same examples in two ways, as one."""
        return replace(
            self,
            underflowed=self.underflowed | other.underflowed,
            by_draw=other.by_draw,
            weighted=other.weighted,
            num_draws=other.num_draws,
            num_path_vjps=other.num_path_vjps,
        )

    def of_batch(self) -> Measurements:
        """One measurement of the whole batch: the gradient of the mean loss, all examples' inputs side by side."""
        n = self.num_examples
        one = Measurements(n, self.underflowed, num_draws=self.num_draws, num_path_vjps=self.num_path_vjps)
        if self.by_draw is not None:
            one.by_draw = [_norm(array) / n for array in self.by_draw]
        if self.weighted is not None:
            one.weighted = [
                [replace(w, norms=_norm(w.norms) / n) for w in lengths if isinstance(w, WeightedNorms)]
                for lengths in self.weighted
            ]
        if self.norms is not None and self.shares is not None and self.whole is not None:
            one.norms, one.whole = _norm(self.norms) / n, _norm(self.whole) / n
            with np.errstate(invalid="ignore", divide="ignore"):
                weights = (self.whole / self.whole.max()) ** 2
                one.shares = np.nansum(self.shares * weights, 1, keepdims=True) / weights.sum()
        if self.energies is not None and self.energy_errors is not None:
            one.energies = self.energies.sum(1, keepdims=True) / n**2
            one.energy_errors = _norm(self.energy_errors) / n**2
        return one

    @property
    def omitted_share(self) -> float | None:
        """The share of the gradient that no row holds."""
        return None if self.shares is None else float(1 - mean_over_examples(self.shares)[0].sum())

    @property
    def num_without_gradient(self) -> int | None:
        """Number of measurements whose whole gradient is 0."""
        return None if self.whole is None else int((self.whole == 0).sum())

    def columns(self, counts: Sequence[int], average: str) -> dict[str, np.ndarray]:
        """The frame's columns; `counts` is the number of paths of each row."""
        columns: dict[str, np.ndarray] = {}
        if self.norms is not None and self.shares is not None:
            for name, values in (("summed_path_gradient_norm", self.norms), ("gradient_share", self.shares)):
                columns[name], columns[f"{name}_se"] = mean_over_examples(values)
        if self.energies is not None:
            columns |= self._energy_columns(counts)
        if self.by_draw is not None:
            columns |= self._sampled_columns(counts, average)
        if self.weighted is not None:
            columns |= self._weighted_columns(counts)
        return columns | {"underflowed": self.underflowed}

    def _energy_columns(self, counts: Sequence[int]) -> dict[str, np.ndarray]:
        assert self.energies is not None
        assert self.energy_errors is not None
        assert self.norms is not None
        num = self.energies.shape[1]
        energy, se = self.energies.mean(1), _norm(self.energy_errors)[:, 0] / num
        examples_se = mean_over_examples(self.energies)[1]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            # Errors of a root and of a ratio, to first order.
            rms = np.array([_over(root, count) for root, count in zip(np.sqrt(energy), counts, strict=True)])
            coherence = np.sqrt((self.norms**2).mean(1) / energy)
            residual_se = mean_over_examples(self.norms**2 - coherence[:, None] ** 2 * self.energies)[1]
            return {
                "rms_path_gradient_norm": rms,
                "rms_path_gradient_norm_se": rms * (se / energy / 2),
                "rms_path_gradient_norm_examples_se": rms * (examples_se / energy / 2),
                "coherence": coherence,
                "coherence_se": coherence * (se / energy / 2),
                "coherence_examples_se": residual_se / energy / (2 * coherence),
            }

    def _weighted_columns(self, counts: Sequence[int]) -> dict[str, np.ndarray]:
        assert self.weighted is not None
        rows = []
        for row, (count, batches) in enumerate(zip(counts, zip(*self.weighted, strict=True), strict=True)):
            scale = max(batch.scale for batch in batches) or 1.0
            norm, energy = (mean_of(batches, power, scale) for power in (1, 2))
            found = _of_mean("mean_path_gradient_norm", norm, scale)
            found |= {
                f"total_gradient_magnitude{suffix}": _times(found[f"mean_path_gradient_norm{suffix}"], count)
                for suffix in _SUFFIXES
            }
            found |= _of_root("rms_path_gradient_norm", energy, scale)
            if self.norms is not None:
                found |= _of_sums(self.norms[row] / scale, norm, energy, count)
            found["effective_sample_size"] = min(norm.effective_sample_size, energy.effective_sample_size)
            rows.append(found | {"num_draws": norm.num_draws})
        return {name: np.array([found[name] for found in rows]) for name in rows[0]}

    def _sampled_columns(self, counts: Sequence[int], average: str) -> dict[str, np.ndarray]:
        assert self.by_draw is not None
        exponents = np.max([binary_exponents(array.reshape(len(array), -1)) for array in self.by_draw], 0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values = [np.ldexp(array, -exponents[:, None, None]) for array in self.by_draw]
            values = [np.log(array) if average == "log-mean" else array for array in values]
            num = sum(array.shape[2] for array in values)
            mean = sum(array.sum((1, 2)) / array.shape[1] for array in values) / num
            # Examples of a batch share their paths: the draws of a batch are independent, its examples are not.
            variance = sum(
                (array.shape[2] / num) ** 2 * array.mean(2).var(1, ddof=1) / array.shape[1] for array in values
            )
            examples_se = mean_over_examples(np.concatenate([array.mean(1) for array in values], 1))[1]
            se, both = np.sqrt(variance), np.sqrt(variance + examples_se**2)
            if average == "log-mean":
                mean = np.exp(mean)
                se, both = mean * se, mean * both
            mean, se, both = (np.ldexp(column, exponents) for column in (mean, se, both))
        columns = {"mean_path_gradient_norm": (mean, se, both)}
        columns["total_gradient_magnitude"] = tuple(  # type: ignore[assignment]
            np.array([_times(x, count) for x, count in zip(column, counts, strict=True)]) for column in (mean, se, both)
        )
        return {
            f"{name}{suffix}": column
            for name, columns_of_name in columns.items()
            for suffix, column in zip(("", "_se", "_examples_se"), columns_of_name, strict=True)
        }


def _norm(values: np.ndarray) -> np.ndarray:
    """Root of the sum of squares over the last dimension, which stays; no square leaves the range of floats."""
    exponents = binary_exponents(values)[..., None]
    root = np.sqrt((np.ldexp(values, -exponents) ** 2).sum(-1, keepdims=True))
    with np.errstate(over="ignore"):
        norms: np.ndarray = np.ldexp(root, exponents)
    return norms


def _times(value: float, count: int) -> float:
    """``value * count`` for a count of any size; infinite beyond the range of floats."""
    shift = max(count.bit_length() - 64, 0)  # the first 64 bits of the count are more than a float holds
    with np.errstate(over="ignore"):
        return float(np.ldexp(np.float64(value) * (count >> shift), shift))


def _over(root: float, count: int) -> float:
    """``root / sqrt(count)`` for a count of any size."""
    return 0.0 if not root else math.exp(math.log(root) - math.log(count) / 2)


_SUFFIXES = ("", "_se", "_examples_se", "_low", "_high")


def _of_mean(name: str, mean: Mean, scale: float) -> dict[str, float]:
    numbers = (mean.value, mean.se, math.hypot(mean.se, mean.examples_se), mean.low, mean.high)
    return {f"{name}{suffix}": number * scale for suffix, number in zip(_SUFFIXES, numbers, strict=True)}


def _of_root(name: str, energy: Mean, scale: float) -> dict[str, float]:
    """The root of an energy; its errors to first order."""
    root = math.sqrt(energy.value)
    slope = 0.5 / root if root else 0.0
    errors = (slope * energy.se, slope * math.hypot(energy.se, energy.examples_se))
    numbers = (root, *errors, math.sqrt(energy.low), math.sqrt(energy.high))
    return {f"{name}{suffix}": number * scale for suffix, number in zip(_SUFFIXES, numbers, strict=True)}


def _of_sums(norms: np.ndarray, norm: Mean, energy: Mean, count: int) -> dict[str, float]:
    """What the norms of the sums over paths say beside the estimates: coherence, and the share that does not cancel."""
    total, square = float(norms.mean()), float((norms**2).mean())

    def coherence_of(value: float) -> float:
        return _over(math.sqrt(square / value), count) if value else math.nan

    def share_of(value: float) -> float:
        return total / _times(value, count) if value else math.nan

    coherence, share = coherence_of(energy.value), share_of(norm.value)
    relative = energy.se / energy.value / 2 if energy.value else math.nan
    of_examples = math.nan
    if energy.value and square:
        residuals = norms**2 / square - energy.each / energy.value
        of_examples = float(mean_over_examples(residuals)[1]) / 2
    return {
        "coherence": coherence,
        "coherence_se": coherence * relative,
        "coherence_examples_se": coherence * math.hypot(relative, of_examples),
        "coherence_low": coherence_of(energy.high),
        "coherence_high": coherence_of(energy.low),
        "uncancelled_share": share,
        "uncancelled_share_se": share * norm.se / norm.value if norm.value else math.nan,
        "uncancelled_share_low": share_of(norm.high),
        "uncancelled_share_high": share_of(norm.low),
    }

"""Estimates of all lengths together from populations of paths (`resnet_paths.core.backward.populations`).

What a path is expected to bring to the sums of each length decides whether it is kept: the norm of its cotangent so
far, and the odds of the blocks below. Of the ways to keep N of the paths the one is taken that keeps the largest for
certain and has the least variance for the others (Fearnhead and Clifford 2003, "On-line inference for hidden Markov
models via particle filters"), by systematic sampling in the order of their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from resnet_paths.core.backward.completions import Completions, completions, nothing_below
from resnet_paths.core.backward.gains import Gains
from resnet_paths.core.backward.populations import Population
from resnet_paths.core.paths import enumerate_paths
from resnet_paths.gradients.estimates import Draws, Points, norms_of
from resnet_paths.gradients.importance import PathDraws, PopulationMeans, WeightedNorms, mean_of
from resnet_paths.gradients.measurements import Measurements
from resnet_paths.gradients.points import Place, Point

__all__ = ["Chooser", "kept", "measure_populations"]

# One population of twice as many paths is better than two, but the errors take several. The mean over more examples
# has a smaller error anyway.
_MOST_PATHS = 128
_LEAST_PATHS = 64
_PATHS_OF_ALL_EXAMPLES = 512
# Degrees of freedom of a standard error, over populations and examples. With half as many, errors were too small where
# a path of much weight was kept, by chance, in every population, or in none.
_LEAST_DEGREES = 60
_LEAST_POPULATIONS = 4
_MOST_POPULATIONS = 100
_WORTH = 1e-3  # lengths that hold less of the sum over all lengths need not be known well
_LEAST_PRIORITY = 0.04
_LEAST_SCORE = 0.02  # of the mean score: more may come of a path than is expected
_Z = 1.96


def kept(
    log_scores: np.ndarray, lengths: np.ndarray, number: int, uniforms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A random choice of paths, each with a probability proportional to its score, or 1.

    Args:
        log_scores: Logarithms of the scores, [row, batch].
        lengths: Lengths of the paths, likewise; among paths of like lengths the number that is kept varies least.
        number: How many rows to keep; fewer than there are.
        uniforms: A random number of each example in [0, 1), [batch].

    Returns:
        The rows that are kept, [number, batch]; the logarithms of their probabilities, +inf where there was no further
        path of a positive score.
    """
    largest = log_scores.max(0)
    scores = np.where(np.isfinite(largest), np.exp(log_scores - np.where(np.isfinite(largest), largest, 0)), 1.0)
    ranks = np.arange(len(scores))[:, None]
    order = np.argsort(-scores, 0, kind="stable")
    falling = np.take_along_axis(scores, order, 0)
    left = np.cumsum(falling[::-1], 0)[::-1]
    certain = np.logical_and.accumulate((falling * (number - ranks) >= left) & (ranks < number), 0)
    num_certain = certain.sum(0)
    rest = np.take_along_axis(left, num_certain[None], 0)[0]
    factor = np.divide(number - num_certain, rest, out=np.zeros_like(rest), where=rest > 0)
    probabilities = np.minimum(scores * factor, 1.0)
    np.put_along_axis(probabilities, order, np.where(certain, 1.0, np.take_along_axis(probabilities, order, 0)), 0)
    order = np.lexsort(np.stack([-scores.T, lengths.T])).T
    ends = np.minimum(np.cumsum(np.take_along_axis(probabilities, order, 0), 0), number)
    steps = np.diff(np.floor(ends + uniforms), axis=0, prepend=np.floor(uniforms)[None]) > 0
    chosen = np.zeros_like(steps)
    np.put_along_axis(chosen, order, steps, 0)
    rows = np.argsort(~chosen, 0, kind="stable")[:number]
    is_path = np.take_along_axis(chosen & (scores > 0), rows, 0)
    logs = np.log(np.where(is_path, np.take_along_axis(probabilities, rows, 0), 1.0))
    return rows, np.where(is_path, logs, np.inf)


@dataclass(frozen=True)
class Chooser:
    """Keeps the paths that are expected to matter most.

    Attributes:
        number: How many.
        lengths: The lengths that are wanted.
        priorities: How much the relative variance of each counts, for norms and their squares, [power, length].
        streams: Source of the random numbers of each example.
    """

    number: int
    lengths: Sequence[int]
    priorities: np.ndarray
    streams: Sequence[np.random.Generator]

    def __call__(self, population: Population, below: Completions) -> Population:
        """The paths that are kept, with their weights."""
        if len(population) <= self.number:
            return population
        scores = self._log_scores(population, below)
        uniforms = np.array([stream.random() for stream in self.streams])
        return population.chosen(*kept(scores, population.lengths, self.number, uniforms))

    def _log_scores(self, population: Population, below: Completions) -> np.ndarray:
        # A choice with probabilities p adds at most the sum over paths of share^2 / p to a relative variance; p in
        # proportion to the root of the sum over lengths of share^2 makes the sum of these variances least.
        norms, examples = population.log_norms(), np.arange(below.shape[1])[None, :, None]
        longer = np.array(self.lengths) - population.lengths[..., None]
        squares = np.zeros_like(norms)
        for power, (expected, priorities) in enumerate(zip(below, self.priorities, strict=True), start=1):
            logs = (population.log_weights + power * norms)[..., None] + np.where(
                longer >= 0, expected[examples, np.maximum(longer, 0)], -np.inf
            )
            largest = logs.max(0)
            shares = np.exp(logs - np.where(np.isfinite(largest), largest, 0))
            shares /= np.maximum(shares.sum(0), 1)
            squares += (shares**2 * priorities).sum(2)
        with np.errstate(divide="ignore"):
            scores: np.ndarray = np.log(squares) / 2
            largest = scores.max(0)
            least = np.log(np.exp(scores - np.where(np.isfinite(largest), largest, 0)).mean(0) * _LEAST_SCORE) + largest
        return np.where(np.isfinite(scores), np.logaddexp(scores, least), scores)


def measure_populations(place: Place, points: Points, counts: Mapping[int, int], draws: Draws) -> Measurements:
    """Mean norms and energies of the paths of all lengths from populations; each example has its own paths.

    Where a length has no more paths than a population, each is measured once; if their number is not given, also where
    that takes at most a tenth of the block VJPs of the populations.

    Args:
        place: Where the gradients are wanted.
        points: The batch.
        counts: Number of paths of each length.
        draws: How many paths a population has, and how well the means are to be known.

    Returns:
        What was measured.
    """
    num_examples = sum(point.num_examples for point in points(1))
    number = draws.number or min(_MOST_PATHS, max(_LEAST_PATHS, _PATHS_OF_ALL_EXAMPLES // num_examples))
    if draws.number is None:
        of_populations = number * _least_populations(num_examples) * len(place.above)
        few = [k for k, count in counts.items() if k * count <= of_populations / 10]
    else:
        few = [k for k, count in counts.items() if count <= number]
    found: dict[int, PathDraws] = {}
    paths = {k: list(enumerate_paths(place.above, k)) for k in few}
    norms, lost, _ = norms_of(points, [path for k in few for path in paths[k]])
    underflowed = dict.fromkeys(counts, False)
    for k in few:
        of_length, norms, lost_here, lost = norms[: counts[k]], norms[counts[k] :], lost[: counts[k]], lost[counts[k] :]
        found[k] = WeightedNorms(np.ones(counts[k]), of_length, complete=True)
        underflowed[k] = bool(lost_here.any())
    vjps = sum(k * counts[k] for k in few)
    others = {k: count for k, count in counts.items() if k not in few}
    if others:
        means, of_populations = _from_populations(points, others, draws, number, num_examples)
        found |= means
        vjps += of_populations
        for k, one in means.items():
            norm = one.log_means[0]
            underflowed[k] = bool((np.isfinite(norm) & (np.exp(norm) == 0)).any())
    return Measurements(
        num_examples,
        np.array(list(underflowed.values())),
        weighted=[[found[k] for k in counts]],
        num_draws=max(one.num_draws for one in found.values()),
        num_path_vjps=vjps,
    )


def _from_populations(
    points: Points, counts: Mapping[int, int], draws: Draws, number: int, num_examples: int
) -> tuple[dict[int, PopulationMeans], int]:
    """Means at some lengths from populations of a number of paths, and the block VJPs that they took."""
    lengths = list(counts)
    log_counts = np.array([math.log(count) for count in counts.values()])
    shares = [_expected_shares(point, lengths) for point in points(1)]
    priorities = np.clip(np.concatenate(shares, 1).mean(1) / _WORTH, _LEAST_PRIORITY, 1.0)
    populations: list[_Sums] = []
    found: list[PopulationMeans] = []
    wanted = _least_populations(num_examples)
    while len(populations) < wanted:
        seeds = torch.randint(
            2**62, (wanted - len(populations),), generator=draws.generator, device=draws.generator.device
        ).tolist()
        parts, first = [], 0
        for point in points(2 * number):
            gains, numbers = point.gains(), range(first, first + point.num_examples)
            of_seeds = ([np.random.default_rng((seed, one)) for one in numbers] for seed in seeds)
            choosers = (Chooser(number, lengths, priorities, streams) for streams in of_seeds)
            parts.append([_sums_of(point, gains, lengths, chooser) for chooser in choosers])
            first += point.num_examples
        populations += [_Sums.joined(some) for some in zip(*parts, strict=True)]
        log_means = np.stack([one.logs for one in populations], 1) - log_counts[:, None]
        # Of an example on average, at least 1 where there was any.
        num_paths = -(-np.sum([one.num_paths for one in populations], 0) // num_examples)
        found = [PopulationMeans(log_means[:, :, k], int(n)) for k, n in enumerate(num_paths)]
        if draws.number is None:
            wanted, priorities = _needed(found, log_counts, draws.relative_error)
    return dict(zip(lengths, found, strict=True)), sum(one.num_block_vjps for one in populations)


def _least_populations(num_examples: int) -> int:
    return max(_LEAST_POPULATIONS, 1 + math.ceil(_LEAST_DEGREES / num_examples))


@dataclass(frozen=True)
class _Sums:
    """What a population gave.

    Attributes:
        logs: Logarithms of the weighted sums of norms and of their squares, [power, length, example].
        num_paths: Number of paths of each length, of all examples together.
        num_block_vjps: Block VJPs for an example.
    """

    logs: np.ndarray
    num_paths: np.ndarray
    num_block_vjps: int

    @classmethod
    def joined(cls, parts: Sequence[_Sums]) -> _Sums:
        """Of several parts of a batch."""
        return cls(
            np.concatenate([part.logs for part in parts], 2),
            np.sum([part.num_paths for part in parts], 0),
            max(part.num_block_vjps for part in parts),
        )


def _sums_of(point: Point, gains: Gains, lengths: Sequence[int], chooser: Chooser) -> _Sums:
    population, log_norms = point.of_population(gains, lengths[-1], chooser)
    of_length = population.lengths[None] == np.array(lengths)[:, None, None]
    logs = [
        np.logaddexp.reduce(np.where(of_length, population.log_weights + power * log_norms, -np.inf), 1)
        for power in (1, 2)
    ]
    num_paths = (of_length & np.isfinite(population.log_weights)).sum((1, 2))
    return _Sums(np.stack(logs), num_paths, population.num_block_vjps)


def _expected_shares(point: Point, lengths: Sequence[int]) -> np.ndarray:
    """Shares of the sums over all lengths by the odds of the blocks alone, [power, batch, length]."""
    below = nothing_below(point.num_examples, lengths[-1])
    logs = completions(point.gains(), point.place.above.path_choices, below)[-1]
    shares: np.ndarray = np.exp(logs - np.logaddexp.reduce(logs, 2, keepdims=True))[..., lengths]
    return shares


def _needed(found: Sequence[PopulationMeans], log_counts: np.ndarray, relative_error: float) -> tuple[int, np.ndarray]:
    """How many populations it takes, and how much each relative variance should count in those to come.

    Returns:
        Their number in all, and priorities [power, length].
    """
    populations = found[0].log_means.shape[1]
    excess = np.zeros((2, len(found)))
    for power in (1, 2):
        scales = [one.scale or 1.0 for one in found]
        means = [mean_of([one], power, scale) for one, scale in zip(found, scales, strict=True)]
        with np.errstate(divide="ignore"):
            logs = log_counts + np.log([mean.value for mean in means]) + power * np.log(scales)
        worth = logs >= np.logaddexp.reduce(logs[~np.isnan(logs)]) + math.log(_WORTH)
        for row in np.flatnonzero(worth & np.isfinite(logs)):
            mean = means[row]
            # The upper end of the interval, since estimates that come out low state a small error.
            excess[power - 1, row] = max(mean.se, (mean.high - mean.value) / _Z) / mean.value / relative_error
    worst = excess.max()
    needed = populations * min(max(1.1 * worst**2, 1.2), 2.0) if worst > 1 else populations
    priorities = np.clip((excess / max(worst, 1e-300)) ** 2, _LEAST_PRIORITY, 1.0)
    return min(math.ceil(needed), _MOST_POPULATIONS), priorities

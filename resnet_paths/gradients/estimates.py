"""The estimates over single paths of one batch: weighted paths, the paper's uniform paths, and random signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from resnet_paths._utils.arguments import require_fraction, require_int, seeded_generator
from resnet_paths._utils.statistics import mean_over_examples
from resnet_paths.core.paths import Path, enumerate_paths
from resnet_paths.core.sampling import sample_paths
from resnet_paths.gradients.importance import WeightedNorms, mean_of
from resnet_paths.gradients.measurements import Measurements
from resnet_paths.gradients.points import Place, Point
from resnet_paths.gradients.weighted import Proposal

__all__ = [
    "SIGNS_AT_ONCE",
    "Draws",
    "Points",
    "measure_exactly",
    "measure_uniform",
    "measure_weighted",
    "norms_of",
    "rows_at_once",
]

_MOST_SIGNS = 1000
SIGNS_AT_ONCE = 8
_PATHS_AT_ONCE = 64
_FIRST_PATHS = 20  # of each length; how many of which length are needed is seen from these
_LEAST_PATHS = 128  # before a standard error is trusted: with 64 as many as one in 100 was off by 4 of its own
_MOST_PATHS = 5000
_FEW_PATHS = 256  # a length that has no more is measured exactly
_Z = 1.96
_WORTH = 1e-3  # lengths that hold less of the sum over all lengths need not be known well

Points = Callable[[int], Iterable[Point]]
"""From the number of rows carried at once to the parts of a batch."""


@dataclass(frozen=True)
class Draws:
    """How many random paths or signs to draw.

    Attributes:
        number: Of each length, or of signs; None until `relative_error` is reached.
        relative_error: Relative standard error at which to stop.
        generator: Source of the random numbers.
    """

    number: int | None
    relative_error: float
    generator: torch.Generator

    @classmethod
    def of(cls, num_draws: object, relative_error: object, generator: object) -> Draws:
        """What a caller asked for.

        Args:
            num_draws: The number, of at least 2, so that the error can be estimated; or None.
            relative_error: Between 0 and 1.
            generator: None for a new one, seeded with 0.

        Returns:
            The number, the error and the generator.
        """
        number = None if num_draws is None else require_int("num_draws", num_draws, 2)
        error = require_fraction("relative_error", relative_error)
        return cls(number, error, seeded_generator("generator", generator))


def rows_at_once(lengths: Sequence[int], signs: Draws | None) -> int:
    """Rows of cotangents that `measure_exactly` carries."""
    return (lengths[-1] + 1) * (1 if signs is None else min(signs.number or SIGNS_AT_ONCE, SIGNS_AT_ONCE))


def measure_exactly(point: Point, lengths: Sequence[int], signs: Draws | None = None) -> Measurements:
    """Norms and shares of the sums over paths; with `signs`, the energies over paths too.

    Args:
        point: Some examples.
        lengths: The lengths.
        signs: The random signs to draw; None for exact quantities alone.

    Returns:
        What was measured.
    """
    stack = point.by_length(lengths[-1])
    norms, lost = point.norms(stack)
    rows = [k - stack.shortest for k in lengths]
    measured = Measurements(
        point.num_examples,
        np.asarray(lost[rows].any((1, 2))),
        norms[rows, 0],
        point.shares(stack, point.whole)[rows],
        point.norms(point.whole)[0][0, 0],
    )
    del stack
    if signs is None:
        return measured
    energies = np.empty((len(lengths), 0, point.num_examples))
    most = signs.number or _MOST_SIGNS
    while energies.shape[1] < most:
        now = min(most - energies.shape[1], SIGNS_AT_ONCE)

        def draw_signs(now: int = now) -> torch.Tensor:
            source = signs.generator
            bits = torch.randint(2, (now, point.num_examples), generator=source, device=source.device)
            return (2 * bits - 1).to(point.device)

        drawn = point.norms(point.by_length(lengths[-1], now, draw_signs))[0][rows] ** 2
        energies = np.concatenate([energies, drawn], 1)
        measured.energies, errors = mean_over_examples(energies.swapaxes(1, 2))
        measured.energy_errors = errors if energies.shape[1] > 1 else None
        if signs.number is None and energies.shape[1] > SIGNS_AT_ONCE and _is_settled(measured, signs.relative_error):
            break
    measured.num_draws = energies.shape[1]
    # Below the normal numbers a float has fewer digits.
    measured.underflowed |= ((energies.mean(1) < np.finfo(float).tiny) & (norms[rows, 0] > 0)).any(1)
    return measured


def _is_settled(measured: Measurements, relative_error: float) -> bool:
    """Whether the roots of the energies are known well enough, at all lengths that hold a thousandth of the energy."""
    assert measured.energies is not None
    assert measured.energy_errors is not None
    total, error = measured.energies.sum(1), np.hypot.reduce(measured.energy_errors, 1)
    counted = total >= total.sum() * _WORTH
    return bool((error[counted] <= 2 * relative_error * total[counted]).all())


def measure_uniform(place: Place, points: Points, lengths: Sequence[int], draws: Draws) -> Measurements:
    """Norms of uniformly drawn paths; all examples of a batch take the same paths, as in the paper.

    Args:
        place: Where the gradients are wanted.
        points: The batch.
        lengths: The lengths.
        draws: How many paths to draw; 20 of each length if not said.

    Returns:
        What was measured.
    """
    number = draws.number or _FIRST_PATHS
    paths = [path for k in lengths for path in sample_paths(place.above, k, number, draws.generator)]
    norms, lost, num_examples = norms_of(points, paths)
    underflowed: np.ndarray = np.asarray(lost.reshape(len(lengths), number).any(1))
    by_draw = [norms.reshape(len(lengths), number, -1)]
    return Measurements(
        num_examples, underflowed, by_draw=by_draw, num_draws=number, num_path_vjps=number * sum(lengths)
    )


def measure_weighted(place: Place, points: Points, counts: Mapping[int, int], draws: Draws) -> Measurements:
    """Norms of paths drawn in proportion to what they are expected to carry, with their weights.

    Where a length has no more paths than would be drawn, each is measured once. All examples of a batch take the same
    paths.

    Args:
        place: Where the gradients are wanted.
        points: The batch.
        counts: Number of paths of each length.
        draws: How many paths to draw.

    Returns:
        What was measured.
    """
    proposal = Proposal.of(place.above.path_choices, [point.gains() for point in points(1)])
    uniforms = _uniforms(draws.generator)
    drawn: dict[int, list[Path]] = {k: [] for k in counts}
    known: dict[Path, tuple[np.ndarray, bool]] = {}
    least = draws.number or _FIRST_PATHS
    wanted = dict.fromkeys(counts, least)
    if draws.number is None:
        wanted |= {k: max(least, count) for k, count in counts.items() if count <= _FEW_PATHS}
    vjps = num_examples = 0
    found: dict[int, WeightedNorms] = {}
    while wanted:
        for k, number in wanted.items():
            if counts[k] <= number:
                drawn[k] = list(enumerate_paths(place.above, k))
            else:
                drawn[k] += [proposal.draw(k, uniforms) for _ in range(number - len(drawn[k]))]
            new = list(dict.fromkeys(path for path in drawn[k] if path not in known))
            known |= dict.fromkeys(new, _NOT_YET)
            vjps += k * len(new)
        new = [path for path, measured in known.items() if measured is _NOT_YET]
        norms, lost, num_examples = norms_of(points, new, _PATHS_AT_ONCE)
        known |= zip(new, zip(norms, lost.tolist(), strict=True), strict=True)
        for k in wanted:
            found[k] = _weighted(drawn[k], k, counts[k], np.stack([known[path][0] for path in drawn[k]]), proposal)
        wanted = {} if draws.number else _unsettled(found, counts, draws.relative_error)
    return Measurements(
        num_examples,
        np.array([any(known[path][1] for path in drawn[k]) for k in counts], dtype=bool),
        weighted=[list(found.values())],
        num_draws=max(len(one.weights) for one in found.values()),
        num_path_vjps=vjps,
    )


_NOT_YET = (np.empty(0), False)


def _weighted(paths: Sequence[Path], length: int, count: int, norms: np.ndarray, proposal: Proposal) -> WeightedNorms:
    if len(paths) == count and len(set(paths)) == count:
        return WeightedNorms(np.ones(count), norms, complete=True)
    logs = np.array([proposal.log_probability(path, length) for path in paths])
    return WeightedNorms(np.exp(-math.log(count) - logs), norms, complete=False)


def _unsettled(found: Mapping[int, WeightedNorms], counts: Mapping[int, int], relative_error: float) -> dict[int, int]:
    """Lengths whose mean norm or energy is not known well enough, and how many paths they should have."""
    wanted: dict[int, int] = {}
    for power in (1, 2):
        means = {k: mean_of([one], power, float(one.norms.max()) or 1.0) for k, one in found.items()}
        logs = np.array([
            math.log(counts[k]) + math.log(mean.value) + power * math.log(float(found[k].norms.max()))
            if mean.value > 0
            else -math.inf
            for k, mean in means.items()
        ])
        log_shares = logs - np.logaddexp.reduce(logs)
        for (k, mean), log_share in zip(means.items(), log_shares.tolist(), strict=True):
            drawn = len(found[k].weights)
            # The first few paths may miss most of what a length holds.
            least_share = _WORTH / 10 if drawn < _LEAST_PATHS else _WORTH
            if found[k].complete or not log_share >= math.log(least_share) or drawn >= _MOST_PATHS:
                continue
            # The upper end of the interval, since estimates that come out low state a small error.
            excess = max(mean.se, (mean.high - mean.value) / _Z) / mean.value / relative_error
            if drawn < _LEAST_PATHS or excess > 1:
                # At most twice as many: few paths know neither how many it takes nor which lengths count.
                needed = max(_LEAST_PATHS, drawn * min(max(1.1 * excess**2, 1.2), 2.0))
                wanted[k] = max(wanted.get(k, 0), min(math.ceil(needed), _MOST_PATHS))
    return wanted


def norms_of(points: Points, paths: Sequence[Path], rows: int = _PATHS_AT_ONCE) -> tuple[np.ndarray, np.ndarray, int]:
    """Norms of single paths, all examples taking the same ones.

    Args:
        points: The batch.
        paths: The paths; there may be none.
        rows: Paths that are carried at once.

    Returns:
        Norms [path, example]; where they are lost to underflow [path]; and the number of examples.
    """
    found, lost = [], np.zeros(len(paths), dtype=bool)
    for point in points(max(min(len(paths), rows), 1)):
        norms = [np.empty((0, point.num_examples))]
        for start in range(0, len(paths), rows):
            some, underflowed = point.norms(point.of_paths(paths[start : start + rows]))
            norms.append(some[:, 0])
            lost[start : start + rows] |= underflowed.any((1, 2))
        found.append(np.concatenate(norms))
    whole = np.concatenate(found, 1)
    return whole, lost, whole.shape[1]


def _uniforms(generator: torch.Generator) -> Iterator[float]:
    while True:
        yield from torch.rand(1024, generator=generator, dtype=torch.float64, device=generator.device).tolist()

"""Paths drawn in proportion to what they are expected to carry, and their weights: conditional Poisson sampling.

Each block's branch has odds a_i, and a path that takes the branches of a set S is drawn, among the paths of its length
k, with the probability ``prod of a_i over S / e_k(a)``, where e_k is the elementary symmetric polynomial (Chen,
Dempster and Liu 1994, "Weighted finite population sampling to maximize entropy"). Its weight is its probability under
uniform sampling over this one, so that weighted means are unbiased for any odds.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from resnet_paths.core.backward.gains import Gains
from resnet_paths.core.paths import Choices, Entry, InBranch, Path, branch_number

__all__ = ["LogOdds", "Proposal", "WeightedPaths", "log_odds"]

LogOdds: TypeAlias = "list[list[tuple[float, LogOdds | None]]]"
"""For each block, for every entry that it offers: the logarithm of its odds; and those of the chain in that branch."""

_LEAST = math.log(1e-6)  # an entry that the whole gradient does not pass may still carry single paths


def log_odds(gains: Gains, power: float) -> LogOdds:
    """Odds of the entries that blocks offer: ``(|J^T v| / |P^T v|)^power`` for the whole gradient v.

    Args:
        gains: From `resnet_paths.core.backward.gains`, with norms of any number of examples.
        power: 1 to draw paths in proportion to their expected norm, 2 to its square.

    Returns:
        Logarithms, relative to the largest of the block.
    """
    found: LogOdds = []
    for offered in gains:
        totals = np.array([float(torch.logsumexp(power * norms, 0)) for norms, _ in offered])
        # Where no example has a gradient all entries are alike.
        relative = totals - totals.max() if np.isfinite(totals.max()) else np.zeros(len(totals))
        of_block: list[tuple[float, LogOdds | None]] = []
        for total, (_, nested) in zip(np.maximum(relative, power * _LEAST).tolist(), offered, strict=True):
            inner = None if nested is None else log_odds(nested, power)
            # All paths through the inner chain together have the odds of its branch.
            of_block.append((total if inner is None else total - _log_total(inner), inner))
        found.append(of_block)
    return found


def _log_total(odds: LogOdds) -> float:
    """The logarithm of the sum over all paths of the product of their odds."""
    return sum(
        float(np.logaddexp.reduce([own + (0.0 if inner is None else _log_total(inner)) for own, inner in offered]))
        for offered in odds
    )


class WeightedPaths:
    """Draws paths of one length with a probability proportional to the product of their odds.

    Args:
        choices: The entries that each block offers.
        odds: Their odds, in the same order.

    Attributes:
        log_totals: For each length the logarithm of the sum over its paths of the product of their odds.
    """

    def __init__(self, choices: Choices, odds: LogOdds) -> None:
        self.choices = choices
        self._odds = [[own for own, _ in offered] for offered in odds]
        self._inner = [
            [
                WeightedPaths(choice, inner) if isinstance(choice, tuple) and inner is not None else None
                for choice, (_, inner) in zip(offered, of_block, strict=True)
            ]
            for offered, of_block in zip(choices, odds, strict=True)
        ]
        # From block i on: sums over what is left of a path, by its length.
        self._completions = [np.zeros(1)]
        for index in reversed(range(len(choices))):
            parts = [self._log_polynomial(index, number) for number in range(len(choices[index]))]
            of_block = np.full(max(map(len, parts)), -np.inf)
            for part in parts:
                of_block[: len(part)] = np.logaddexp(of_block[: len(part)], part)
            after = self._completions[0]
            total = np.full(len(after) + len(of_block) - 1, -np.inf)
            for length, weight in enumerate(of_block.tolist()):
                place = slice(length, length + len(after))
                total[place] = np.logaddexp(total[place], weight + after)
            self._completions.insert(0, total)
        self.log_totals = self._completions[0]
        self._tables: dict[tuple[int, int], tuple[list[float], list[tuple[int, int]]]] = {}

    def _log_polynomial(self, index: int, number: int) -> np.ndarray:
        """What one entry adds to the length of a path, and the sum of the odds of doing so."""
        own, inner = self._odds[index][number], self._inner[index][number]
        if inner is not None:
            return np.concatenate([[-np.inf], own + inner.log_totals])
        return np.array([-np.inf, own] if self.choices[index][number] else [own])

    def draw(self, length: int, uniforms: Iterator[float]) -> Path:
        """One path of a length that some path has."""
        path: list[Entry] = []
        for index, offered in enumerate(self.choices):
            cumulative, options = self._table(index, length)
            number, taken = options[min(bisect.bisect_right(cumulative, next(uniforms)), len(options) - 1)]
            inner = self._inner[index][number]
            if inner is None:
                path.append(offered[number])
            else:
                path.append(InBranch(inner.draw(taken - 1, uniforms), branch_number(offered[number])))
            length -= taken
        return tuple(path)

    def _table(self, index: int, left: int) -> tuple[list[float], list[tuple[int, int]]]:
        """Entries of a block and what they add to the length, with cumulative probabilities."""
        if (index, left) not in self._tables:
            after = self._completions[index + 1]
            options, logs = [], []
            for number in range(len(self.choices[index])):
                for taken, weight in enumerate(self._log_polynomial(index, number).tolist()):
                    if 0 <= left - taken < len(after) and weight + after[left - taken] > -np.inf:
                        options.append((number, taken))
                        logs.append(weight + after[left - taken])
            cumulative = np.cumsum(np.exp(np.array(logs) - np.logaddexp.reduce(logs))).tolist()
            self._tables[index, left] = (cumulative, options)
        return self._tables[index, left]

    def log_probability(self, path: Path, length: int) -> float:
        """The logarithm of the probability with which `draw` gives a path of this length."""
        return self._log_product(path) - float(self.log_totals[length])

    def _log_product(self, path: Path) -> float:
        """The logarithm of the product of a path's odds."""
        total = 0.0
        for index, (entry, offered) in enumerate(zip(path, self.choices, strict=True)):
            number = [branch_number(choice) for choice in offered].index(branch_number(entry))
            inner = self._inner[index][number]
            total += self._odds[index][number] + (0.0 if inner is None else inner._log_product(entry))  # type: ignore[arg-type]
        return total


_POWERS = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Proposal:
    """A mixture of distributions of paths, each in proportion to a power of their expected norm.

    Mean norms and energies are estimated from the same paths. The probability of a path is that of the mixture, so that
    no weight is larger than four times that of the best power (the balance heuristic of Veach and Guibas 1995). The low
    powers keep the weights small of paths that carry more than the odds say.

    Attributes:
        parts: One for each power.
    """

    parts: tuple[WeightedPaths, ...]

    @classmethod
    def of(cls, choices: Choices, gains: Sequence[Gains]) -> Proposal:
        """From the gains of several parts of a batch."""
        whole = _joined(gains)
        return cls(tuple(WeightedPaths(choices, log_odds(whole, power)) for power in _POWERS))

    def draw(self, length: int, uniforms: Iterator[float]) -> Path:
        """One path of a length that some path has."""
        number = min(int(next(uniforms) * len(self.parts)), len(self.parts) - 1)
        return self.parts[number].draw(length, uniforms)

    def log_probability(self, path: Path, length: int) -> float:
        """The logarithm of the probability with which `draw` gives a path of this length."""
        logs = [part.log_probability(path, length) for part in self.parts]
        return float(np.logaddexp.reduce(logs)) - math.log(len(logs))


def _joined(parts: Sequence[Gains]) -> Gains:
    """The gains of all examples."""
    found: Gains = []
    for blocks in zip(*parts, strict=True):
        of_block: list[tuple[torch.Tensor, Gains | None]] = []
        for entries in zip(*blocks, strict=True):
            inner = [nested for _, nested in entries if nested is not None]
            of_block.append((torch.cat([norms for norms, _ in entries]), _joined(inner) if inner else None))
        found.append(of_block)
    return found

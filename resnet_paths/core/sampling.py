"""Paths drawn uniformly from all paths of one length, at any depth.

Blocks that offer the same are alike: how many branches are taken among them is drawn first, and then which of them. Of
residual blocks the latter is a random subset, so that a path of n blocks costs n steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch

from resnet_paths._utils.arguments import require_generator, require_int
from resnet_paths.core.paths import (
    Choice,
    Choices,
    Entry,
    HasPathChoices,
    InBranch,
    Path,
    branch_number,
    check_length,
    choices_of,
    polynomial_of,
    polynomial_of_block,
)
from resnet_paths.core.polynomials import multiplied, product_of_powers

__all__ = ["sample_paths"]


def sample_paths(chain: HasPathChoices | int, length: int, num_samples: int, generator: torch.Generator) -> list[Path]:
    """Paths drawn uniformly, with replacement, from all paths of one length.

    The protocol of Veit et al. 2016, section 4.3, draws blocks in the same way.

    Args:
        chain: A chain, or a number of residual blocks.
        length: Number of branches taken.
        num_samples: How many to draw.
        generator: Source of the random numbers.

    Returns:
        `num_samples` paths, one entry per block.

    Raises:
        ResnetPathsError: If no path has that length, `num_samples` is negative, or `generator` is not one.

    Example:
        >>> paths = sample_paths(54, length=10, num_samples=3, generator=torch.Generator().manual_seed(0))
        >>> [sum(path) for path in paths]
        [10, 10, 10]
    """
    choices = choices_of(chain)
    length = check_length(choices, length)
    num_samples = require_int("num_samples", num_samples, 0)
    sampler = _Sampler(choices, _Random(require_generator("generator", generator)))
    return [sampler.draw(length) for _ in range(num_samples)]


class _Random:
    """Random numbers from a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._uniforms = self._drawn()

    def index(self, weights: Sequence[int]) -> int:
        """An index with a probability proportional to its exact integer weight."""
        total = sum(weights)
        uniform = next(self._uniforms)
        left = uniform * total if total < 2**53 else int(Fraction(uniform) * total)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return max(i for i, weight in enumerate(weights) if weight)  # rounding brought us to the very end

    def order(self, num: int) -> list[int]:
        """The numbers from 0 to num - 1 in random order."""
        order: list[int] = torch.randperm(num, generator=self.generator, device=self.generator.device).tolist()
        return order

    def _drawn(self) -> Iterator[float]:
        while True:
            yield from torch.rand(
                1024, generator=self.generator, dtype=torch.float64, device=self.generator.device
            ).tolist()


class _Sampler:
    """Draws paths through blocks."""

    def __init__(self, choices: Choices, random: _Random) -> None:
        self.choices, self.random = choices, random
        self.places: dict[tuple[int, ...], list[int]] = {}
        for place, polynomial in enumerate(_polynomials(choices)):
            self.places.setdefault(polynomial, []).append(place)
        # rest[i]: paths by length through the blocks of kinds i, i + 1, ...
        self.rest = [[1]]
        for polynomial, places in reversed(self.places.items()):
            self.rest.append(multiplied(_power(polynomial, len(places)), self.rest[-1]))
        self.rest.reverse()
        self.inner: dict[tuple[Choice, ...], list[_Sampler | None]] = {}

    def draw(self, length: int) -> Path:
        lengths = [0] * len(self.choices)
        for (polynomial, places), rest in zip(self.places.items(), self.rest[1:], strict=True):
            taken = self._split(_power(polynomial, len(places)), rest, length)
            self._spread(polynomial, places, taken, lengths)
            length -= taken
        return tuple(self._entry(tuple(o), n) for o, n in zip(self.choices, lengths, strict=True))

    def _split(self, first: Sequence[int], second: Sequence[int], length: int) -> int:
        """How much of a length falls to the first of two groups of blocks."""
        most = min(length, len(first) - 1)
        least = max(0, length - len(second) + 1)
        if least == most:
            return least
        return least + self.random.index([first[k] * second[length - k] for k in range(least, most + 1)])

    def _spread(self, polynomial: tuple[int, ...], places: Sequence[int], length: int, lengths: list[int]) -> None:
        """Write into `lengths` what each of several blocks of one polynomial takes of a length."""
        if len(places) == 1:
            lengths[places[0]] = length
        elif len(polynomial) <= 2:
            least = 0 if polynomial[0] else 1  # of a block without skip each takes one
            order = self.random.order(len(places)) if least * len(places) < length < len(places) else range(len(places))
            for index in order[:length]:
                lengths[places[index]] = 1
        else:
            half = len(places) // 2
            powers = (_power(polynomial, half), _power(polynomial, len(places) - half))
            taken = self._split(*powers, length)
            self._spread(polynomial, places[:half], taken, lengths)
            self._spread(polynomial, places[half:], length - taken, lengths)

    def _entry(self, offered: tuple[Choice, ...], length: int) -> Entry:
        """An entry of one block of a length."""
        if offered in ((False, True), (True,), (False,)):
            return bool(length)
        numbers = [_number_of_entries(choice, length) for choice in offered]
        which = self.random.index(numbers) if sum(map(bool, numbers)) > 1 else numbers.index(max(numbers))
        choice = offered[which]
        if not isinstance(choice, tuple):
            return choice
        if offered not in self.inner:
            self.inner[offered] = [_Sampler(c, self.random) if isinstance(c, tuple) else None for c in offered]
        sampler = self.inner[offered][which]
        assert sampler is not None  # of a choice that is a chain
        return InBranch(sampler.draw(length - 1), branch_number(choice))


def _polynomials(choices: Choices) -> Iterator[tuple[int, ...]]:
    """Of each block; blocks that offer the same are computed once."""
    known: dict[tuple[Choice, ...], tuple[int, ...]] = {}
    for offered in map(tuple, choices):
        if offered not in known:
            known[offered] = tuple(polynomial_of_block(offered))
        yield known[offered]


@functools.lru_cache(maxsize=64)
def _power(polynomial: tuple[int, ...], exponent: int) -> list[int]:
    return product_of_powers({polynomial: exponent})


def _number_of_entries(choice: Choice, length: int) -> int:
    """How many entries of one length an alternative stands for."""
    if not isinstance(choice, tuple):
        return int(bool(choice) == length) if length < 2 else 0
    inner = polynomial_of(choice)
    return inner[length - 1] if 0 < length <= len(inner) else 0

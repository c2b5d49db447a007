"""Paths through residual blocks: counting, listing and drawing them, in exact integers at any depth.

A path takes one entry per block: False for the skip, True for the branch (Veit et al. 2016, section 3). Where several
branches run in parallel the entry is the number of the branch, counted from 1; True is 1. Where a branch holds a chain
of its own the entry is the path through that chain: a tuple, an `InBranch` where the branch is not the first. The
length of a path is the number of blocks whose branch it takes, at every depth.

Everything here works on `path_choices`, the entries that each block offers: ``(False, True)`` for a residual block,
``(True,)`` for one without skip, ``(False,)`` for a deleted one, ``(False, inner)`` where the branch is a chain whose
own choices are `inner`. A plain int n stands for n residual blocks.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, SupportsIndex, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import pandas as pd

from resnet_paths._utils.arguments import is_boolean, require_int, require_list
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.polynomials import lengths_of_product, product_of_powers

__all__ = [
    "Choices",
    "Entry",
    "InBranch",
    "Path",
    "branch_number",
    "check_length",
    "check_path",
    "choices_of",
    "enumerate_paths",
    "lengths_up_to",
    "path_histogram",
    "path_length",
    "path_polynomial",
    "polynomial_of",
    "polynomial_of_block",
]

_MOST_BITS = 8 * 8 * 10**9

T = TypeVar("T")

Entry: TypeAlias = "int | tuple[Entry, ...]"
"""What a path takes at one block: False (0) = skip, True (1) = branch, 2, 3... = further parallel branches; a path
through the chain inside the branch, where the branch holds one."""

Path: TypeAlias = tuple[Entry, ...]
"""One entry per block."""

Choice: TypeAlias = "int | tuple[tuple[Choice, ...], ...]"
"""What a block offers: an entry, or the choices of the chain inside its branch, for all paths through it."""

Choices: TypeAlias = Sequence[Sequence[Choice]]
"""What each block of a chain offers."""


@runtime_checkable
class HasPathChoices(Protocol):
    """Anything made of blocks, such as a `ResidualChain`."""

    @property
    def path_choices(self) -> Choices:
        """The entries that each block offers to a path."""


@runtime_checkable
class HasLengths(HasPathChoices, Protocol):
    """Blocks whose lengths can be counted in several units, such as those of a `ResidualChain`."""

    def length_polynomial(self, unit: str) -> list[int]:
        """Number of paths by length."""


class InBranch(tuple[T, ...], Generic[T]):
    """A path through the chain inside a branch, as an entry of a path; or the choices that such a chain offers.

    It is a tuple; that of a block's first branch equals the plain tuple of its entries.

    Args:
        entries: An entry for each block of the chain inside.
        branch: Number of the branch among those that a path may take, counted from 1.
    """

    branch: int

    def __new__(cls, entries: Iterable[T], branch: int = 1) -> InBranch[T]:
        """The entries, with the number of their branch."""
        made = super().__new__(cls, entries)
        made.branch = branch
        return made

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) is True and self.branch == branch_number(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.branch)) if self.branch > 1 else tuple.__hash__(self)

    def __repr__(self) -> str:
        """As a tuple; with the number of the branch where it is not the first."""
        entries = tuple.__repr__(self)
        return f"InBranch({entries}, branch={self.branch})" if self.branch > 1 else entries

    def __getnewargs__(self) -> tuple[tuple[T, ...], int]:
        return tuple(self), self.branch


def branch_number(entry: object) -> int:
    """Number of the branch that an entry of a path takes, counted from 1; 0 for the skip."""
    if isinstance(entry, tuple):
        return getattr(entry, "branch", 1)
    return int(entry)  # type: ignore[call-overload,no-any-return]


def choices_of(chain: HasPathChoices | int) -> Choices:
    """The entries that each block offers: of a chain, or of n residual blocks.

    Args:
        chain: A chain, or the number n >= 0 of residual blocks.

    Returns:
        One tuple of entries per block.

    Raises:
        ResnetPathsError: If `chain` is neither.

    Example:
        >>> choices_of(2)
        ((False, True), (False, True))
    """
    if isinstance(chain, SupportsIndex) or is_boolean(chain):
        return ((False, True),) * require_int("chain", chain, 0)
    if not isinstance(chain, HasPathChoices):
        raise ResnetPathsError(
            "chain",
            type(chain).__name__,
            "a ResidualChain, or a number of blocks",
            "Make one with resnet_paths.unravel(model, example_inputs).",
        )
    return chain.path_choices


def path_polynomial(chain: HasPathChoices | int) -> list[int]:
    """Number of paths by length: the coefficients of the product over blocks of (skips + branches * t).

    A branch that holds a chain of its own contributes t times the polynomial of that chain.

    Args:
        chain: A chain, or a number of residual blocks.

    Returns:
        Exact ints; entry k is the number of paths of length k, and the list ends at the longest path. Of n blocks they
        have about n^2 / 11 bytes together: seconds and 1 GB for 100,000 blocks.

    Raises:
        ResnetPathsError: If they would take more than 8 GB.

    Example:
        >>> path_polynomial(3)
        [1, 3, 3, 1]
    """
    choices = choices_of(chain)
    kinds = _kinds_of_block(choices)
    digits = sum(count * math.log2(sum(kind)) for kind, count in kinds.items())
    longest = sum(count * (len(kind) - 1) for kind, count in kinds.items())
    if digits * longest > _MOST_BITS:
        raise ResnetPathsError(
            "chain",
            f"{len(choices)} blocks",
            "a chain whose exact numbers of paths fit into 8 GB",
            "Of n residual blocks path lengths are binomial: scipy.stats.binom(n, 0.5).",
        )
    return polynomial_of(choices)


def polynomial_of(choices: Choices) -> list[int]:
    """Number of paths by length that `choices` allow, exact ints."""
    return product_of_powers(_kinds_of_block(choices))


def _kinds_of_block(choices: Choices) -> Counter[tuple[int, ...]]:
    """How many blocks have each polynomial; a chain has few kinds, of which each is found once."""
    kinds: Counter[tuple[int, ...]] = Counter()
    for offered, count in Counter(map(tuple, choices)).items():
        kinds[tuple(polynomial_of_block(offered))] += count
    return kinds


def polynomial_of_block(offered: Sequence[Choice]) -> list[int]:
    """Number of entries by length that one block offers."""
    total = [0]
    for choice in offered:
        inner = [0, *polynomial_of(choice)] if isinstance(choice, tuple) else [0, 1] if choice else [1]
        total = [a + b for a, b in itertools.zip_longest(total, inner, fillvalue=0)]
    return total


def _lengths(choices: Choices) -> int:
    """The lengths of at least one path: bit k is set for length k."""
    return lengths_of_product(_kinds_of_block(choices))


def lengths_up_to(counts: Sequence[int], max_length: int | None) -> list[int]:
    """The lengths that paths may have.

    Args:
        counts: Number of paths by length, from `path_polynomial`.
        max_length: The longest of interest; None for all.

    Returns:
        The lengths of at least one path, in order.

    Raises:
        ResnetPathsError: If no path is as short as `max_length`, or it is longer than the longest.

    Example:
        >>> lengths_up_to([0, 2, 0, 1], None)
        [1, 3]
    """
    possible = [k for k, count in enumerate(counts) if count]
    if max_length is None:
        return possible
    most = require_int("max_length", max_length, possible[0], possible[-1])
    return [k for k in possible if k <= most]


def path_histogram(chain: HasPathChoices | int, unit: str = "block") -> pd.DataFrame:
    """Number and fraction of paths by length: the binomial of Veit et al. 2016, figure 6a.

    Args:
        chain: A chain, or a number of residual blocks.
        unit: Unit of path length: ``"block"``; ``"transformer_layer"``, which counts attention and MLP of one layer
            together; or ``"weight_layer"``. `resnet_paths.core.units` defines them for each family of networks. A
            number of blocks allows ``"block"`` only.

    Returns:
        One row per length from 0 to the longest path: ``path_length``; ``num_paths``, an exact Python int at any depth;
        ``fraction`` of all paths, the float nearest to the exact ratio.

    Raises:
        ResnetPathsError: If the unit is another, or not defined for the chain.

    Example:
        >>> frame = path_histogram(54)
        >>> print(f"{frame.fraction[5:18].sum():.5%} at 5 to 17 blocks, {frame.fraction[19:36].sum():.4%} at 19 to 35")
        0.45367% at 5 to 17 blocks, 98.0166% at 19 to 35
        >>> int(frame.num_paths.sum()) == 2**54
        True
    """
    if isinstance(chain, HasLengths):
        counts = chain.length_polynomial(unit)
    else:
        counts = path_polynomial(chain)
        if unit != "block":
            raise ResnetPathsError(
                "unit", unit, "'block' for a number of blocks", "Pass a chain to count in other units."
            )
    total = sum(counts)
    return pd.DataFrame({
        "path_length": range(len(counts)),
        "num_paths": pd.Series(counts, dtype=object),
        # Division of Python ints rounds correctly, whatever their size.
        "fraction": [count / total for count in counts],
    })


def enumerate_paths(chain: HasPathChoices | int, length: int | None = None) -> Iterator[Path]:
    """Iterate over all paths, or over all paths of one length, without storing them.

    Args:
        chain: A chain, or a number of residual blocks.
        length: Number of branches taken; None for every length.

    Returns:
        An iterator over tuples with one entry per block, skips before branches.

    Raises:
        ResnetPathsError: If no path has that length.

    Example:
        >>> list(enumerate_paths(2))
        [(False, False), (False, True), (True, False), (True, True)]
        >>> list(enumerate_paths(3, length=1))
        [(False, False, True), (False, True, False), (True, False, False)]
    """
    choices = choices_of(chain)
    return _paths(choices, _ANY_LENGTH if length is None else 1 << check_length(choices, length))


_ANY_LENGTH = -1


def _paths(choices: Choices, allowed: int) -> Iterator[Path]:
    """Paths of the lengths k whose bit k is set in `allowed`."""
    if not choices:
        if allowed & 1:
            yield ()
        return
    # lengths_from[i]: bit k is set if blocks i, i + 1, ... can make a path of length k.
    lengths_from = [1]
    for offered in reversed(choices):
        lengths_from.append(lengths_of_product({tuple(polynomial_of_block(offered)): 1}, lengths_from[-1]))
    lengths_from.reverse()
    path: list[Entry] = []
    left = [allowed]
    walkers = [_entries(choices[0], allowed, lengths_from[1])]
    while walkers:
        entry = next(walkers[-1], None)
        if entry is None:
            walkers.pop()
            left.pop()
            if path:
                path.pop()
        elif len(path) + 1 == len(choices):
            yield (*path, entry)
        else:
            path.append(entry)
            left.append(left[-1] >> _length_of_entry(entry))
            walkers.append(_entries(choices[len(path)], left[-1], lengths_from[len(path) + 1]))


def _entries(offered: Sequence[Choice], allowed: int, lengths_after: int) -> Iterator[Entry]:
    """Entries of one block after which the later blocks can still make one of the lengths allowed."""
    for choice in offered:
        if isinstance(choice, tuple):
            possible = [k for k, bit in enumerate(bin(_lengths(choice))[:1:-1]) if bit == "1"]
            inner = _paths(choice, sum(1 << k for k in possible if allowed >> (k + 1) & lengths_after))
            yield from (InBranch(path, branch_number(choice)) for path in inner)
        elif allowed >> bool(choice) & lengths_after:
            yield choice


def entries_of(offered: Sequence[Choice]) -> Iterator[Entry]:
    """All entries that one block offers, those of paths through a chain inside its branch included.

    Args:
        offered: The block's choices.

    Returns:
        An iterator over them, each once.
    """
    return _entries(offered, _ANY_LENGTH, _ANY_LENGTH)


def path_length(path: Path) -> int:
    """Number of blocks whose branch a path takes, those inside branches included.

    Args:
        path: The path.

    Returns:
        Its length.

    Example:
        >>> path_length((True, False, True)), path_length((False, (True, False)))
        (2, 2)
    """
    return sum(map(_length_of_entry, path))


def _length_of_entry(entry: Entry) -> int:
    return 1 + path_length(entry) if isinstance(entry, tuple) else int(bool(entry))


def check_path(choices: Choices, path: Sequence[Entry]) -> Path:
    """`path` as a tuple, once it is known to be one of the paths that `choices` allow.

    Args:
        choices: The entries that each block offers.
        path: The path.

    Returns:
        The path.

    Raises:
        ResnetPathsError: If its number of entries is wrong, or a block does not offer its entry.
    """
    listed = require_list("path", path, f"{len(choices)} entries, one a block")
    path = tuple(entry.item() if isinstance(entry, np.generic) else entry for entry in listed)
    if len(path) != len(choices):
        raise ResnetPathsError("path", path, f"{len(choices)} entries, one a block")
    for index, (entry, offered) in enumerate(zip(path, choices, strict=True)):
        inner = {branch_number(choice): choice for choice in offered if isinstance(choice, tuple)}
        if isinstance(entry, tuple) and branch_number(entry) in inner:
            check_path(inner[branch_number(entry)], entry)
        elif not isinstance(entry, int) or entry not in offered:
            raise ResnetPathsError(
                f"path[{index}]",
                entry,
                f"one of {offered}",
                "False takes the skip, True the branch.",
            )
    return path


def check_length(choices: Choices, length: object) -> int:
    """Validate that a path that `choices` allow has a length; returns it as a plain int."""
    possible = _lengths(choices)
    longest = possible.bit_length() - 1
    length = require_int("length", length, 0, longest)
    if not possible >> length & 1:
        shortest = (possible & -possible).bit_length() - 1
        raise ResnetPathsError("length", length, f"the length of a path, from {shortest} to {longest}")
    return length


def num_paths(choices: Choices) -> int:
    """Number of paths that `choices` allow, exactly.

    Args:
        choices: The entries that each block offers.

    Returns:
        The product of their numbers.
    """
    return math.prod(
        sum(num_paths(c) if isinstance(c, tuple) else 1 for c in offered) ** count
        for offered, count in Counter(map(tuple, choices)).items()
    )

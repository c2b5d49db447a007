"""Paths through residual blocks: counting, listing and drawing them, in exact integers at any depth.

A path takes one entry a block: False for the skip, True for the branch (Veit et al. 2016, section 3). Where several
branches run in parallel the entry is the number of the branch, counted from 1; True is 1. Its length is the number of
blocks whose branch it takes.

Everything here works on `path_choices`, the entries that each block offers: ``(False, True)`` for a residual block,
``(True,)`` for one without skip, ``(False,)`` for a deleted one. A plain int n stands for n residual blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, SupportsIndex

import pandas as pd
import torch

from resnet_paths.errors import ResnetPathsError

__all__ = ["Path", "check_path", "enumerate_paths", "path_histogram", "path_polynomial", "sample_paths"]

Path = tuple[int, ...]
"""One entry a block: False (0) = skip, True (1) = branch, 2, 3... = further parallel branches."""


class HasPathChoices(Protocol):
    """Anything made of blocks, such as a `ResidualChain`."""

    @property
    def path_choices(self) -> tuple[Path, ...]:
        """The entries that each block offers to a path."""


def choices_of(chain: HasPathChoices | int) -> tuple[Path, ...]:
    """The entries that each block offers: of a chain, or of n residual blocks.

    Args:
        chain: A chain, or the number n >= 0 of residual blocks.

    Returns:
        One tuple of entries a block.

    Raises:
        ResnetPathsError: If `chain` is neither.

    Example:
        >>> choices_of(2)
        ((False, True), (False, True))
    """
    if isinstance(chain, SupportsIndex):
        if chain.__index__() < 0 or isinstance(chain, bool):
            raise ResnetPathsError("chain", chain, "a chain, or a number of blocks of at least 0")
        return ((False, True),) * chain.__index__()
    if not hasattr(chain, "path_choices"):
        raise ResnetPathsError(
            "chain", type(chain).__name__, "a ResidualChain, or a number of blocks",
            "Make one with resnet_paths.unravel(model, example_inputs).",
        )  # fmt: skip
    return chain.path_choices


def path_polynomial(chain: HasPathChoices | int) -> list[int]:
    """Number of paths by length: the coefficients of the product over blocks of (skips + branches * t).

    Args:
        chain: A chain, or a number of residual blocks.

    Returns:
        Exact ints; entry k is the number of paths of length k, and the list ends at the longest path.

    Example:
        >>> path_polynomial(3)
        [1, 3, 3, 1]
    """
    coefficients = [1]
    for choices in choices_of(chain):
        branches = sum(1 for c in choices if c)
        skips = len(choices) - branches
        longer = [branches * c for c in coefficients]
        coefficients = [skips * a + b for a, b in zip([*coefficients, 0], [0, *longer], strict=True)]
        if not coefficients[-1]:
            coefficients.pop()
    return coefficients


def path_histogram(chain: HasPathChoices | int) -> pd.DataFrame:
    """Number and fraction of paths by length: the binomial of Veit et al. 2016, figure 6a.

    Args:
        chain: A chain, or a number of residual blocks.

    Returns:
        A row a length from 0 to the longest path: ``path_length``; ``num_paths``, an exact Python int at any depth;
        ``fraction`` of all paths, the float nearest to the exact ratio.

    Example:
        >>> frame = path_histogram(54)
        >>> print(f"{frame.fraction[5:18].sum():.5%} at 5 to 17 blocks, {frame.fraction[19:36].sum():.4%} at 19 to 35")
        0.45367% at 5 to 17 blocks, 98.0166% at 19 to 35
        >>> int(frame.num_paths.sum()) == 2**54
        True
    """
    counts = path_polynomial(chain)
    total = sum(counts)
    return pd.DataFrame({
        "path_length": range(len(counts)),
        "num_paths": pd.Series(counts, dtype=object),
        # Division of Python ints rounds correctly, whatever their size.
        "fraction": [count / total for count in counts],
    })


def enumerate_paths(chain: HasPathChoices | int, length: int | None = None) -> Iterator[Path]:
    """All paths, or all of one length, one by one; nothing is stored.

    Args:
        chain: A chain, or a number of residual blocks.
        length: Number of branches taken; None for every length.

    Returns:
        An iterator over tuples with an entry a block, in lexicographic order when `length` is None.

    Raises:
        ResnetPathsError: If no path has that length.

    Example:
        >>> list(enumerate_paths(2))
        [(False, False), (False, True), (True, False), (True, True)]
        >>> list(enumerate_paths(3, length=1))
        [(True, False, False), (False, True, False), (False, False, True)]
    """
    choices = choices_of(chain)
    if length is None:
        return itertools.product(*choices)
    _check_length(choices, length)
    return _paths_of_length(choices, length)


def _paths_of_length(choices: Sequence[Path], length: int) -> Iterator[Path]:
    forced = [i for i, c in enumerate(choices) if all(c)]
    optional = [i for i, c in enumerate(choices) if any(c) and not all(c)]
    for chosen in itertools.combinations(optional, length - len(forced)):
        taken = {*forced, *chosen}
        yield from itertools.product(*(tuple(e for e in c if bool(e) == (i in taken)) for i, c in enumerate(choices)))


def sample_paths(chain: HasPathChoices | int, length: int, num_samples: int, generator: torch.Generator) -> list[Path]:
    """Paths drawn uniformly, with replacement, from all paths of one length.

    The protocol of Veit et al. 2016, section 4.3, draws blocks in the same way.

    Args:
        chain: A chain, or a number of residual blocks.
        length: Number of branches taken.
        num_samples: How many to draw.
        generator: Source of the random numbers.

    Returns:
        `num_samples` paths, an entry a block.

    Raises:
        ResnetPathsError: If no path has that length, or `num_samples` is negative.

    Example:
        >>> paths = sample_paths(54, length=10, num_samples=3, generator=torch.Generator().manual_seed(0))
        >>> [sum(path) for path in paths]
        [10, 10, 10]
    """
    choices = choices_of(chain)
    _check_length(choices, length)
    if num_samples < 0:
        raise ResnetPathsError("num_samples", num_samples, "an int of at least 0")
    # completions[i][k]: ways to go on from block i with k branches still to take.
    completions = [[1] + [0] * length]
    for c in reversed(choices):
        num_branches = sum(1 for e in c if e)
        after = completions[0]
        here = [
            (len(c) - num_branches) * after[k] + (num_branches * after[k - 1] if k else 0) for k in range(length + 1)
        ]
        completions.insert(0, here)
    draws = torch.rand(num_samples, len(choices), 2, generator=generator, dtype=torch.float64, device=generator.device)
    paths = []
    for row in draws.tolist():
        path, left = [], length
        for i, (c, (branch_draw, which_draw)) in enumerate(zip(choices, row, strict=True)):
            branches = [e for e in c if e]
            through_branch = len(branches) * completions[i + 1][left - 1] if left else 0
            take = branch_draw < through_branch / completions[i][left]
            path.append(branches[int(which_draw * len(branches))] if take else False)
            left -= take
        paths.append(tuple(path))
    return paths


def check_path(choices: Sequence[Path], path: Sequence[int]) -> Path:
    """`path` as a tuple, once it is known to be one of the paths that `choices` allow.

    Args:
        choices: The entries that each block offers.
        path: The path.

    Returns:
        The path.

    Raises:
        ResnetPathsError: If its number of entries is wrong, or a block does not offer its entry.
    """
    path = tuple(path)
    if len(path) != len(choices):
        raise ResnetPathsError("path", path, f"{len(choices)} entries, one a block")
    for index, (entry, offered) in enumerate(zip(path, choices, strict=True)):
        if entry not in offered:
            raise ResnetPathsError(
                f"path[{index}]", entry, f"one of {offered}",
                "False takes the skip, True the branch.",
            )  # fmt: skip
    return path


def _check_length(choices: Sequence[Path], length: int) -> None:
    shortest = sum(1 for c in choices if all(c))
    longest = sum(1 for c in choices if any(c))
    if not isinstance(length, SupportsIndex) or not shortest <= length.__index__() <= longest:
        raise ResnetPathsError("length", length, f"an int from {shortest} to {longest}")


def num_paths(choices: Sequence[Path]) -> int:
    """Number of paths that `choices` allow, exactly.

    Args:
        choices: The entries that each block offers.

    Returns:
        The product of their numbers.
    """
    return math.prod(len(c) for c in choices)

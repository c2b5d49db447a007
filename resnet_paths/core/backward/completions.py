"""What blocks are expected to make of the norm of a path that comes from above, by the blocks that it still takes.

Each entry that a block offers has odds, the power of what the whole gradient keeps of its norm after it
(`resnet_paths.core.backward.gains`). The paths below a place that take m more blocks are expected to hold, all
together, the elementary symmetric polynomial of order m of the odds of the blocks below; a chain in a branch counts as
an entry of several lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from resnet_paths.core.backward.gains import Gains
from resnet_paths.core.paths import Choices

__all__ = ["Completions", "completions", "nothing_below"]

Completions = np.ndarray
"""Logarithms of the expected sums over completions that take 0, 1, ... more blocks, [power, batch, length]."""

_POWERS = np.array([1.0, 2.0])[:, None]
_LEAST = math.log(1e-6)  # an entry that the whole gradient does not pass may still carry single paths


def nothing_below(batch: int, longest: int) -> Completions:
    """The completion that is at its end: 1 of no more blocks, for norms and their squares."""
    found = np.full((len(_POWERS), batch, longest + 1), -np.inf)
    found[..., 0] = 0
    return found


def completions(gains: Gains, choices: Choices | Sequence[tuple[object, ...]], below: Completions) -> list[Completions]:
    """Completions at the input of each block and, last, at the output of the last one.

    Args:
        gains: Of the blocks, first to last.
        choices: The entries that each block offers.
        below: Completions at the input of the first block.

    Returns:
        One array for each place.
    """
    found = [below]
    for offered, entries in zip(gains, choices, strict=True):
        logs = np.stack([_POWERS * norms.numpy() for norms, _ in offered])
        largest = logs.max(0)
        # Where there is no gradient all entries are alike.
        logs = np.where(np.isfinite(largest), logs - np.where(np.isfinite(largest), largest, 0), 0)
        logs = np.maximum(logs, _POWERS * _LEAST)
        total = np.full_like(below, -np.inf)
        for own, (_, nested), entry in zip(logs, offered, entries, strict=True):
            inside = nothing_below(below.shape[1], below.shape[2] - 1)
            if nested is not None:
                assert isinstance(entry, tuple)
                inside = completions(nested, entry, inside)[-1]
                # All paths through the inner chain together have the odds of its branch.
                inside = inside - np.logaddexp.reduce(inside, 2, keepdims=True)
            start = 1 if entry else 0
            for length in range(below.shape[2] - start):
                weight = own[..., None] + inside[..., length : length + 1]
                if np.isfinite(weight).any():
                    place = total[..., start + length :]
                    np.logaddexp(place, weight + found[-1][..., : place.shape[2]], out=place)
        found.append(total)
    return found

"""Frames of studies: the rows that are deletions of a number of blocks, and interactions of pairs of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import studentised_interval

__all__ = ["deletions_of", "pair_interactions"]

_OF_EXAMPLES, _INTACT = "error_rate_per_example", "intact_error_rate_per_example"


def deletions_of(argument: str, frame: pd.DataFrame, num_blocks: int, effects: Sequence[str]) -> pd.DataFrame:
    """The rows in which a number of blocks were deleted and nothing else was done.

    Args:
        argument: What the caller calls the frame.
        frame: From `resnet_paths.lesion_study`.
        num_blocks: How many blocks.
        effects: Columns that are read.

    Returns:
        One row per set of blocks. The same deletion twice in one study, such as one that was drawn twice, is one row.

    Raises:
        ResnetPathsError: If columns are missing, or a deletion has two different effects, as in two studies joined.
    """
    needed = ["kind", "blocks", *effects]
    columns = list(frame.columns) if isinstance(frame, pd.DataFrame) else []
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ResnetPathsError(
            argument,
            f"columns {', '.join(map(str, columns))}" if columns else type(frame).__name__,
            f"a frame of lesion_study, with columns {', '.join(needed)}",
            f"Missing: {', '.join(missing)}.",
        )
    rows = frame[frame["kind"] == "delete"]
    for blocks in rows["blocks"]:
        if not isinstance(blocks, tuple):
            raise ResnetPathsError(
                f"{argument}['blocks']",
                blocks,
                "tuples of positions, as in a frame of lesion_study",
                "A CSV file keeps them as text.",
            )
    rows = rows[rows["blocks"].map(len) == num_blocks].drop_duplicates(["blocks", *effects])
    twice = rows.loc[rows["blocks"].duplicated(), "blocks"].tolist()
    if twice:
        raise ResnetPathsError(
            argument,
            f"different effects of deleting {', '.join(map(str, twice[0]))}",
            "the rows of one study",
            "Take those of one network.",
        )
    return rows


def pair_interactions(frame: pd.DataFrame) -> pd.DataFrame:
    """The cost of deleting two blocks less the sum of the costs of deleting each alone.

    Args:
        frame: From `lesion_study` with `pair_deletions`: single deletions and pairs. Rows of other lesions are left
            out.

    Returns:
        One row per pair: ``first``, ``second`` (positions), ``error_rate_increase``, ``additive`` (the sum of both
        single increases), ``interaction`` (the difference): above 0 where each block compensates for the loss of the
        other. Of a study with ``per_example=True`` also ``interaction_low`` and ``interaction_high``, its 95 % interval
        over examples, corrected for skewness; missing where it is the same for all examples.

    Raises:
        ResnetPathsError: If the frame is of another kind or of two studies, or a pair lacks one of its single
            deletions.
    """
    single, pairs = (deletions_of("frame", frame, size, ["error_rate_increase"]) for size in (1, 2))
    alone = dict(zip(single["blocks"], single["error_rate_increase"].astype(float), strict=True))
    has_examples = _OF_EXAMPLES in frame and _INTACT in frame
    of_single = dict(zip(single["blocks"], map(_increase_of_examples, single.to_dict("records")), strict=True))
    rows = []
    for row in pairs.to_dict("records"):
        blocks, increase = row["blocks"], float(row["error_rate_increase"])
        missing = [block for block in blocks if (block,) not in alone]
        if missing:
            raise ResnetPathsError(
                "frame",
                f"no single deletion of block {missing[0]}",
                "single deletions of all blocks in pairs",
                "Study pair_deletions(chain), which holds them.",
            )
        additive = sum(alone[block,] for block in blocks)
        rows.append({
            "first": blocks[0],
            "second": blocks[1],
            "error_rate_increase": increase,
            "additive": additive,
            "interaction": increase - additive,
        })
        if has_examples:
            each = _increase_of_examples(row) - sum(of_single[block,] for block in blocks)
            each = each[~np.isnan(each)]
            interval = studentised_interval(increase - additive, (each - each.mean()) / len(each))
            rows[-1] |= {"interaction_low": interval.low, "interaction_high": interval.high}
    intervals = ["interaction_low", "interaction_high"] if has_examples else []
    return pd.DataFrame(rows, columns=["first", "second", "error_rate_increase", "additive", "interaction", *intervals])


def _increase_of_examples(row: Mapping[Hashable, Any]) -> np.ndarray:
    """Increase of the error of each example; empty without ``per_example``."""
    if _OF_EXAMPLES not in row or _INTACT not in row:
        return np.empty(0)
    increase: np.ndarray = np.asarray(row[_OF_EXAMPLES], float) - np.asarray(row[_INTACT], float)
    return increase

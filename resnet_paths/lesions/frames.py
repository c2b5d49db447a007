"""Frames of studies: the rows that are deletions of a number of blocks, and interactions of pairs of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import studentised_interval

__all__ = ["deletions_of", "pair_interactions"]

_INFLUENCES, _INTACT_INFLUENCES = "error_rate_influences", "intact_error_rate_influences"
_INTACT_RATES = "intact_error_rate_per_example"
_OF_EXAMPLES = ("num_examples", "intact_error_rate")  # the same for all lesions that were measured on the same examples


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
        over examples, corrected for skewness; missing where it is the same for all examples. With ``stop_when`` the
        interval has the level of those of the study, the column ``interval_level``.

    Raises:
        ResnetPathsError: If the frame is of another kind or of two studies, a pair lacks one of its single deletions,
            or they were measured on other examples, as with ``stop_when``.
    """
    single, pairs = (deletions_of("frame", frame, size, ["error_rate_increase"]) for size in (1, 2))
    alone = {row["blocks"]: row for row in single.to_dict("records")}
    has_examples = all(name in frame for name in (_INFLUENCES, _INTACT_INFLUENCES, _INTACT_RATES))
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
        singles = [alone[block,] for block in blocks]
        for name in _OF_EXAMPLES:
            if name in row and any(one[name] != row[name] for one in singles):
                raise ResnetPathsError(
                    "frame",
                    f"{name} {row[name]} of blocks {blocks}, {' and '.join(str(one[name]) for one in singles)} of each",
                    "a pair and its single deletions measured on the same examples",
                    "With stop_when, lesions stop after different numbers of examples: leave it out.",
                )
        additive = sum(float(one["error_rate_increase"]) for one in singles)
        rows.append({
            "first": blocks[0],
            "second": blocks[1],
            "error_rate_increase": increase,
            "additive": additive,
            "interaction": increase - additive,
        })
        if has_examples:
            terms = np.stack([row[_INFLUENCES], *(-one[_INFLUENCES] for one in singles), row[_INTACT_INFLUENCES]])
            each = terms.sum(0)
            each[np.abs(each) < 1e-12 * np.abs(terms).sum(0)] = 0.0  # rounding
            has_items = ~np.isnan(row[_INTACT_RATES])
            interval = studentised_interval(increase - additive, each[has_items], row.get("interval_level", 0.95))
            rows[-1] |= {"interaction_low": interval.low, "interaction_high": interval.high}
    intervals = ["interaction_low", "interaction_high"] if has_examples else []
    return pd.DataFrame(rows, columns=["first", "second", "error_rate_increase", "additive", "interaction", *intervals])

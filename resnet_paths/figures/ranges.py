"""Heat maps of studies of ranges of blocks: deleted, or run twice."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import Normal, Stroke

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures.layout import INK, axes_of, checked, draw_map, label_and_scale, legend_above

__all__ = ["plot_range_deletions", "plot_range_repeats"]

_OUTLINE = [Stroke(linewidth=2.0, foreground=INK), Normal()]


def plot_range_deletions(frame: pd.DataFrame, ax: Axes | None = None, value: str = "cross_entropy_increase") -> Axes:
    """Heat map over the first block and the number of deleted blocks, with the best first block of each number.

    Gromov et al. 2024, figure 4: there of ``angular_distance``, whose lowest value chooses what to delete.

    Args:
        frame: From `resnet_paths.lesion_study` of `resnet_paths.range_deletions`, other rows are left out; or from
            `resnet_paths.predicted_effects` with several numbers as `span`.
        ax: The axes to draw into; the current axes if None.
        value: Column of the frame, such as ``"cross_entropy_increase"``, ``"perplexity"`` or ``"angular_distance"``.

    Returns:
        The axes. The line joins the lowest value of each number of blocks. Colours end at the 2nd and 98th percentile
        where values are far beyond them; cells without a range are grey.

    Raises:
        ResnetPathsError: If columns are missing, there is no range, all values are NaN, the rows are of several
            networks, or a range occurs twice with different values.
    """
    rows = _ranges(frame, value, "delete")
    ax = axes_of(ax)
    table = _table(rows, "num_blocks", "first", value)
    _draw(ax, table, value, diverging=False)
    best = rows.loc[rows.groupby("num_blocks")[value].idxmin()]
    handles = ax.plot(
        best["first"],
        best["num_blocks"],
        color="white",
        linewidth=1.0,
        marker="o",
        markersize=2.5,
        path_effects=_OUTLINE,
        label="lowest of each row",
    )
    ax.set(xlabel="first deleted block (index from 0)", ylabel="number of deleted blocks")
    legend_above(ax, handles)
    return ax


def plot_range_repeats(frame: pd.DataFrame, ax: Axes | None = None, value: str = "cross_entropy_increase") -> Axes:
    """Heat map over the first and the last block of a range that is run twice.

    Args:
        frame: From `resnet_paths.lesion_study` of `resnet_paths.range_repeats`; other rows are left out.
        ax: The axes to draw into; the current axes if None.
        value: Column of the frame. Colours of increases diverge from 0: blue ranges improve the network.

    Returns:
        The axes. Colours end at the 2nd and 98th percentile where values are far beyond them; cells without a range are
        grey.

    Raises:
        ResnetPathsError: If columns are missing, there is no range, all values are NaN, the rows are of several
            networks, or a range occurs twice with different values.
    """
    rows = _ranges(frame, value, "duplicate_range")
    ax = axes_of(ax)
    _draw(ax, _table(rows, "last", "first", value), value, diverging=value.endswith("_increase"))
    ax.set(xlabel="first repeated block (index from 0)", ylabel="last repeated block", aspect="equal")
    return ax


def _ranges(frame: pd.DataFrame, value: str, kind: str) -> pd.DataFrame:
    """The rows of one kind whose blocks are neighbours, with ``first`` and ``last``."""
    if not isinstance(frame, pd.DataFrame) or "blocks" not in frame:
        shown = list(frame.columns) if isinstance(frame, pd.DataFrame) else type(frame).__name__
        raise ResnetPathsError("frame", shown, "a frame of lesion_study, with the column blocks")
    rows = frame[frame["kind"] == kind] if "kind" in frame else frame
    rows = rows[[isinstance(b, tuple) and len(b) > 0 and b == tuple(range(b[0], b[-1] + 1)) for b in rows["blocks"]]]
    if not len(rows):
        plan = "range_deletions" if kind == "delete" else "range_repeats"
        raise ResnetPathsError("frame", f"no row of kind {kind!r}", f"a study of {plan}(chain)")
    networks = list(rows["network"].unique()) if "network" in rows else []
    if len(networks) > 1:
        raise ResnetPathsError("frame", networks, "rows of one network", "Draw one map for each network.")
    rows = rows.assign(first=[b[0] for b in rows["blocks"]], last=[b[-1] for b in rows["blocks"]])
    # The same lesion may be twice in a plan, such as that of one block and of a range of one block.
    if isinstance(value, str) and value in rows:
        rows = rows.drop_duplicates(["first", "last", value])
    return checked("frame", rows, value, ["first", "last"], ["num_blocks"]).reset_index(drop=True)


def _table(rows: pd.DataFrame, up: str, across: str, value: str) -> pd.DataFrame:
    """Values [up, across], with whole rows and columns of NaN where nothing was studied."""
    table = rows.pivot_table(index=up, columns=across, values=value)
    every = [range(int(axis.min()), int(axis.max()) + 1) for axis in (table.index, table.columns)]
    return table.reindex(index=every[0], columns=every[1])


def _draw(ax: Axes, table: pd.DataFrame, value: str, *, diverging: bool) -> None:
    label, scale = label_and_scale(value)
    colours = None if diverging else "viridis"
    draw_map(ax, table.columns, table.index, scale * table.to_numpy(np.float64), label, colours, robust=True)

"""Figures of the values of subsets of blocks: Shapley and Banzhaf values, interactions of pairs, the spectrum."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from resnet_paths._utils.arguments import require_choice
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures.layout import (
    INK,
    MARKERS,
    MUTED,
    axes_of,
    checked,
    draw_map,
    groups_of,
    label_and_scale,
    legend_above,
    unit_of,
    whole_numbers_from_zero,
)

__all__ = ["plot_interaction_spectrum", "plot_shapley_interactions", "plot_shapley_values"]

_VALUES = {"shapley": "Shapley value", "banzhaf": "Banzhaf value"}
_OPEN: dict[str, Any] = {"markersize": 3.5, "markerfacecolor": "none", "markeredgewidth": 0.6}


def plot_shapley_values(frame: pd.DataFrame, ax: Axes | None = None, sampled: pd.DataFrame | None = None) -> Axes:
    """Shapley and Banzhaf value of each block, with bars of the 95 % intervals.

    Args:
        frame: From `resnet_paths.shapley_values`, with both; or from `resnet_paths.sampled_shapley_values`.
        ax: The axes to draw into; the current axes if None.
        sampled: From `resnet_paths.sampled_shapley_values`, to be drawn beside exact values.

    Returns:
        The axes, in percent or points of error for an error rate.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, a block occurs twice, or the frames are of two
            measures.
    """
    columns = [c for c in _VALUES if not isinstance(frame, pd.DataFrame) or c in frame] or ["shapley"]
    drawn = [(frame, column, label) for column, label in _VALUES.items() if column in columns]
    if sampled is not None:
        drawn.append((sampled, "shapley", "Shapley value, sampled"))
    for number, (rows, column, _) in enumerate(drawn):
        argument = "sampled" if rows is sampled else "frame"
        drawn[number] = (checked(argument, rows, column, ["block_index"], _ends(column)), *drawn[number][1:])
    label, scale = _label_of_measure(pd.concat([rows for rows, _, _ in drawn]))
    ax = axes_of(ax)
    for number, ((rows, column, name), marker) in enumerate(zip(drawn, cycle(MARKERS), strict=False)):
        low, high = (scale * rows[end] for end in _ends(column))
        value = scale * rows[column]
        ax.errorbar(
            rows["block_index"] + 0.2 * (number - (len(drawn) - 1) / 2),
            value,
            yerr=[value - low, high - value],
            fmt=marker,
            markersize=3,
            linewidth=0,
            elinewidth=0.7,
            color=f"C{number}",
            label=name,
        )
    ax.axhline(0, color=MUTED, linewidth=0.7, zorder=0)
    ax.set(xlabel="block (index from 0)", ylabel=f"contribution to the {label}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_shapley_interactions(frame: pd.DataFrame, ax: Axes | None = None, value: str = "shapley_interaction") -> Axes:
    """Heat map of the interaction of each pair of blocks.

    Args:
        frame: From `resnet_paths.shapley_interactions`.
        ax: The axes to draw into; the current axes if None.
        value: ``"shapley_interaction"`` or ``"banzhaf_interaction"``.

    Returns:
        The axes, with colours that diverge from 0. Of a margin, red pairs need each other, blue ones replace each
        other; of an error or a loss the reverse.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, a pair occurs twice, or the value is another one.
    """
    require_choice("value", value, ("shapley_interaction", "banzhaf_interaction"))
    frame = checked("frame", frame, value, ["first", "second"])
    label, scale = _label_of_measure(frame)
    ax = axes_of(ax)
    blocks = np.arange(frame["first"].min(), frame["second"].max() + 1)
    both = pd.concat([frame, frame.rename(columns={"first": "second", "second": "first"})])
    table = both.pivot_table(index="first", columns="second", values=value).reindex(blocks, columns=blocks)
    label = "interaction (points of error)" if scale == 100 else f"interaction ({unit_of(label) or label})"
    draw_map(ax, blocks, blocks, scale * table.to_numpy(np.float64), label)
    ax.set(xlabel="block (index from 0)", ylabel="block (index from 0)", aspect="equal")
    return ax


def plot_interaction_spectrum(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of the variance of the value by order of interaction, with bars of the 95 % intervals.

    Args:
        frame: From `resnet_paths.interaction_spectrum`; an optional column ``network``, or else ``measure``, separates
            several spectra and names them in the legend.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes, with a legend. Open marks are the shares that the choice of examples alone is expected to add.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, or an order occurs twice.
    """
    has = isinstance(frame, pd.DataFrame)
    by = ["network"] if has and "network" in frame else ["measure"] if has and "measure" in frame else []
    name = "variance_share"
    frame = checked("frame", frame, name, [*by, "order"], [*_ends(name), "noise_share"])
    ax = axes_of(ax)
    groups = groups_of(frame, by, "order")
    for number, ((group, rows), marker) in enumerate(zip(groups, cycle(MARKERS), strict=False)):
        at, value = rows["order"] + 0.12 * (number - (len(groups) - 1) / 2), 100 * rows[name]
        low, high = (100 * rows[end] for end in _ends(name))
        ax.errorbar(
            at,
            value,
            yerr=[(value - low).clip(lower=0), (high - value).clip(lower=0)],
            marker=marker,
            markersize=3.5,
            linewidth=0.8,
            elinewidth=0.7,
            color=f"C{number}",
            label=group,
        )
        ax.plot(at, 100 * rows["noise_share"], f"C{number}{marker}", **_OPEN)
    ax.plot([], [], color=INK, marker="o", linestyle="none", label="added by the choice of examples", **_OPEN)
    whole_numbers_from_zero(ax)
    ax.set(xlabel="order (number of blocks that interact)", ylabel="share of the variance (%)")
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def _ends(column: str) -> list[str]:
    return [f"{column}_low", f"{column}_high"]


def _label_of_measure(frame: pd.DataFrame) -> tuple[str, int]:
    """The label of values, and what they are multiplied by: those of error rates are shown in points."""
    measures = list(frame["measure"].unique()) if "measure" in frame else []
    if len(measures) > 1:
        raise ResnetPathsError("frame", measures, "values of one measure", "Draw one figure for each measure.")
    if not measures:
        return "value", 1
    if measures[0] == "error_rate":
        return "error (points)", 100
    return label_and_scale(str(measures[0]))

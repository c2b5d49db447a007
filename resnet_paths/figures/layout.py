"""Common parts of all figures: validation of frames, markers and greys, integer axes, legends above the axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from resnet_paths._utils.errors import ResnetPathsError

__all__ = [
    "INK",
    "MARKERS",
    "MUTED",
    "axes_of",
    "checked",
    "draw_map",
    "draw_sum",
    "groups_of",
    "label_and_scale",
    "legend_above",
    "mark_stages",
    "unit_of",
    "whole_numbers_from_zero",
]

MARKERS = "osD^vP"
INK, MUTED = "0.2", "0.75"

_LABELS = {
    "angular_distance": "angular distance (fraction of 180°)",
    "cross_entropy": "cross-entropy (nats)",
    "cross_entropy_increase": "cross-entropy increase (nats)",
    "error_rate": "error (%)",
    "error_rate_increase": "error increase (points)",
    "kl_divergence": "KL divergence (nats)",
    "log_probability": "log-probability (nats)",
    "margin": "margin (logits)",
}


def label_and_scale(value: str) -> tuple[str, int]:
    """The axis label of a measure or an output, and what its numbers are multiplied by: rates are shown in percent."""
    if not isinstance(value, str):
        raise ResnetPathsError("value", value, "the name of a measure")
    return _LABELS.get(value, value.replace("_", " ")), 100 if value in ("error_rate", "error_rate_increase") else 1


def unit_of(label: str) -> str:
    """The unit in parentheses at the end of a label; an empty string if there is none."""
    return label.removesuffix(")").rpartition(" (")[2] if label.endswith(")") else ""


def axes_of(ax: Axes | None) -> Axes:
    """The axes to draw into: those that are given, or the current ones.

    Args:
        ax: Axes, or None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If it is something else.
    """
    if ax is not None and not isinstance(ax, Axes):
        raise ResnetPathsError("ax", type(ax).__name__, "matplotlib Axes, or None")
    return plt.gca() if ax is None else ax


def checked(
    argument: str, frame: pd.DataFrame, value: str, keys: Sequence[str], others: Sequence[str] = (), rate: bool = False
) -> pd.DataFrame:
    """Validate a frame: required columns, numbers in `value`, and one row per combination of `keys`.

    Rows with NaN in `value` are allowed, missing values in `keys` are not.

    Args:
        argument: Name of the caller's argument.
        frame: The frame.
        value: The column to draw.
        keys: Columns that identify a row.
        others: Further numeric columns.
        rate: Whether `value` and `others` are rates in [0, 1].

    Returns:
        The frame.

    Raises:
        ResnetPathsError: If the frame is invalid.
    """
    needed = [*keys, value, *others]
    for name in needed:
        if not isinstance(name, str):
            raise ResnetPathsError(f"column of {argument}", name, "the name of a column")
    if not isinstance(frame, pd.DataFrame):
        raise ResnetPathsError(argument, type(frame).__name__, f"a pandas DataFrame with columns {', '.join(needed)}")
    missing = [name for name in needed if name not in frame]
    if missing:
        raise ResnetPathsError(
            argument,
            f"columns {', '.join(map(str, frame.columns)) or '(none)'}",
            f"columns {', '.join(needed)}",
            f"Missing: {', '.join(missing)}.",
        )
    for name in (value, *others):
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise ResnetPathsError(f"{argument}[{name!r}]", f"dtype {frame[name].dtype}", "a column of numbers")
    if not frame[value].notna().any():
        raise ResnetPathsError(argument, f"{len(frame)} rows", f"at least one row with a number in {value}")
    for name in keys:
        without = int(frame[name].isna().sum())
        if without:
            raise ResnetPathsError(
                f"{argument}[{name!r}]", f"no value in {without} of {len(frame)} rows", "a value in every row"
            )
    twice = frame.loc[frame.duplicated(list(keys)), list(keys)]
    if len(twice):
        raise ResnetPathsError(
            argument,
            f"{len(twice)} repeated rows, first {', '.join(f'{k} = {v}' for k, v in twice.iloc[0].items())}",
            f"one row for each {', '.join(keys)}",
            "" if "network" in keys else "Add a column network if these are several networks.",
        )
    for name in (value, *others) if rate else ():
        wrong = frame.loc[(frame[name] < 0) | (frame[name] > 1), name].tolist()
        if wrong:
            raise ResnetPathsError(f"{argument}[{name!r}]", wrong[0], "a rate in [0, 1]", "Divide percentages by 100.")
    return frame


def groups_of(frame: pd.DataFrame, by: Sequence[str], along: str) -> list[tuple[Any, pd.DataFrame]]:
    """Name and rows of each network.

    Args:
        frame: The frame.
        by: Columns that identify a network.
        along: The column on the horizontal axis.

    Returns:
        Pairs in the order of the frame, the rows sorted along the horizontal axis.
    """
    if not by:
        return [(None, frame.sort_values(along))]
    name = by[0] if len(by) == 1 else list(by)
    return [(group, rows.sort_values(along)) for group, rows in frame.groupby(name, sort=False)]


def whole_numbers_from_zero(ax: Axes) -> None:
    """Start the vertical axis at 0 and use integer ticks on the horizontal axis.

    Args:
        ax: The axes.
    """
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def legend_above(ax: Axes, *groups: Sequence[Artist], gap_points: float = 3) -> None:
    """Place legends above the axes, the last group on top, each with as many columns as fit.

    Args:
        ax: The axes.
        *groups: Labelled artists, one legend per group.
        gap_points: Space between axes and legend in points.
    """
    ax.figure.canvas.figure.draw_without_rendering()  # runs the layout, which determines the width of the axes
    raised, legend = gap_points / 72, None
    for handles in filter(None, groups):
        if legend is not None:
            ax.add_artist(legend)  # otherwise the next legend would replace it
        labels = [str(handle.get_label()) for handle in handles]
        above = ax.transAxes + ScaledTranslation(0, raised, ax.figure.dpi_scale_trans)
        for columns in range(len(labels), 0, -1):
            legend = ax.legend(
                handles,
                labels,
                loc="lower left",
                bbox_to_anchor=(0, 1),
                bbox_transform=above,
                ncols=columns,
                frameon=False,  # without paper_style, matplotlib's frame would cross the handles: there is no padding
                borderaxespad=0,
                borderpad=0,
                labelspacing=0.3,
                handlelength=1.6,
                handletextpad=0.5,
                columnspacing=0.8,
            )
            extent = legend.get_window_extent()
            if extent.width <= ax.bbox.width:
                break
        raised += extent.height / ax.figure.dpi + 2 / 72


def mark_stages(ax: Axes, starts: Sequence[int]) -> None:
    """Mark stage starts by thin lines with a marker on top, and label one of them.

    Args:
        ax: The axes, with its horizontal limits set.
        starts: Positions of the first blocks of stages, in increasing order.
    """
    along = ax.get_xaxis_transform()
    ax.vlines(starts, 0, 1, color=MUTED, linewidth=0.5, zorder=0.5, transform=along)
    tops = [1.0] * len(starts)
    ax.plot(starts, tops, linestyle="none", marker="v", markersize=3, color=INK, clip_on=False, transform=along)
    gaps = np.diff([*starts, ax.get_xlim()[1]])
    ax.annotate(
        "stage starts",
        (starts[int(np.argmax(gaps))], 1),
        xycoords=along,
        xytext=(4, 0),
        textcoords="offset points",
        va="bottom",
        fontsize="small",
        color=INK,
    )


def draw_map(
    ax: Axes,
    x: Sequence[int] | pd.Index | np.ndarray,
    y: Sequence[int] | pd.Index | np.ndarray,
    values: np.ndarray,
    label: str,
    sequential: str | None = None,
    *,
    robust: bool = False,
    vmin: float | None = None,
    vmax: float | None = None,
) -> None:
    """Draw a heat map with a colour bar; cells without a value are grey.

    Args:
        ax: The axes.
        x: Whole numbers along the horizontal axis, in increasing order; those left out get grey cells.
        y: Likewise along the vertical axis.
        values: Array [y, x], NaN where there is no value; infinite ones have the first or the last colour.
        label: Of the colour bar.
        sequential: A sequential colour map; None for one that diverges from 0.
        robust: Whether colours end at the 2nd and the 98th percentile where values are farther beyond them than half of
            what is between them, so that few extreme values leave the others distinct; an arrow on the colour bar then
            shows that there are values beyond.
        vmin: Value of the first colour; that of the map if None.
        vmax: Likewise of the last colour.
    """
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    least, most = float(finite.min()), float(finite.max())
    low, high = least, most
    if robust:  # values of the map itself: between two, one extreme value would count
        low = float(np.percentile(finite, 2, method="higher"))
        high = float(np.percentile(finite, 98, method="lower"))
        half = (high - low) / 2 or np.inf  # if nearly all values are equal, all are shown
        low, high = (low if low - least > half else least, high if most - high > half else most)
    if sequential is None:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    low, high = (low if vmin is None else vmin, high if vmax is None else vmax)
    x, y, values = _with_every_number(np.asarray(x), np.asarray(y), values)
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    across, up = (np.append(at, at[-1] + 1) - 0.5 for at in (x, y))
    mesh = ax.pcolormesh(across, up, values, cmap=sequential or "RdBu_r", vmin=low, vmax=high, rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02, extend=beyond[least < low, most > high])
    ax.set_facecolor("0.9")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _with_every_number(x: np.ndarray, y: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same map with NaN at the numbers that are left out, whose places neighbouring cells would cover."""
    across, up = (np.arange(at[0], at[-1] + 1) for at in (x, y))
    whole = np.full((len(up), len(across)), np.nan)
    whole[np.ix_(y - y[0], x - x[0])] = values
    return across, up, whole


def draw_sum(ax: Axes, at: tuple[float, float], on: bool, muted: bool, points: float, sign: str = "+") -> None:
    """Draw a circle with a sign, the symbol of an addition.

    Args:
        ax: The axes.
        at: Center of the circle.
        on: Whether it is highlighted.
        muted: Whether it is muted if it is not highlighted.
        points: Diameter in points.
        sign: A matplotlib marker.
    """
    colour = "C0" if on else MUTED if muted else INK
    line = min(0.11 * points, 1.0)
    ax.plot(*at, marker="o", markersize=points, color="white", markeredgecolor=colour, markeredgewidth=line, zorder=4)
    ax.plot(*at, marker=sign, markersize=0.6 * points, color=colour, markeredgewidth=line, zorder=5)

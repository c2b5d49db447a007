"""Figures of the gradient by path length (Veit et al. 2016, figures 6b and 6c), for one or several networks."""

from __future__ import annotations

import math
from itertools import cycle

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from resnet_paths._utils.arguments import require_float
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures.layout import INK, MARKERS, MUTED, axes_of, checked, draw_map, groups_of, legend_above
from resnet_paths.gradients import PAPER_WINDOW, BlockIndependence, GeometricDecay, effective_window

__all__ = [
    "plot_block_independence",
    "plot_coherence",
    "plot_effective_window",
    "plot_pair_covariances",
    "plot_path_gradients",
    "plot_path_shares",
    "plot_windows",
]

_NORMS = {
    "mean_path_gradient_norm": "one path, mean (sampled)",
    "rms_path_gradient_norm": "one path, root mean square",
    "summed_path_gradient_norm": "sum of all paths",
    "total_gradient_magnitude": "total magnitude",
}
_SHARES = _NORMS | {"gradient_share": "gradient share", "fraction": "paths"}


def plot_path_gradients(
    *frames: pd.DataFrame, ax: Axes | None = None, decay: GeometricDecay | None = None, min_norm: float | None = None
) -> Axes:
    """Gradient norm against path length, on a logarithmic axis (Veit et al. 2016, figure 6b).

    One line per column of norms, of single paths and of their sum, with bars of one standard error.

    Args:
        *frames: From `resnet_paths.gradient_by_path_length`.
        ax: The axes to draw into; the current axes if None.
        decay: From `resnet_paths.gradients.fit_decay`, drawn as a dashed line through the norms of the first frame.
        min_norm: Lower limit of the vertical axis; the smallest norm if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If no frame has a column of norms, two frames have the same one, or a length occurs twice.
    """
    names = ("mean_path_gradient_norm", "rms_path_gradient_norm", "summed_path_gradient_norm")
    columns = [(frame, name) for frame in frames for name in names if name in getattr(frame, "columns", ())]
    if not columns:
        raise ResnetPathsError("frames", len(frames), f"frames with one of the columns {', '.join(names)}")
    found = [name for _, name in columns]
    for name in set(found):
        if found.count(name) > 1:
            raise ResnetPathsError(
                "frames",
                f"{found.count(name)} frames with {name}",
                "each column of norms in one frame",
                "Draw the other frames into other axes, or drop the column from them.",
            )
    if decay is not None and not isinstance(decay, GeometricDecay):
        raise ResnetPathsError("decay", type(decay).__name__, "what gradients.fit_decay returns, or None")
    if min_norm is not None:
        min_norm = require_float("min_norm", min_norm, "a number above 0", math.ulp(0.0))
    ax = axes_of(ax)
    for (frame, name), marker in zip(columns, cycle(MARKERS), strict=False):
        rows = checked("frames", frame, name, ["path_length"]).sort_values("path_length")
        rows = rows[rows[name] > 0]
        error = rows.get(f"{name}_se")
        ax.errorbar(
            rows["path_length"],
            rows[name],
            yerr=error,
            label=_NORMS[name],
            marker=marker,
            markersize=2.5,
            linewidth=0.7,
            elinewidth=0.5,
        )
    if decay is not None:
        frame, name = columns[0]
        rows = frame[frame[name] > 0]
        k = rows["path_length"].to_numpy(dtype=float)
        level = np.median(np.log(rows[name].to_numpy()) - k * np.log(decay.rate))
        label = f"fit, factor {decay.rate:.2f} per block"
        ax.plot(k, np.exp(level + k * np.log(decay.rate)), linestyle="dashed", color=INK, linewidth=0.7, label=label)
    ax.set(yscale="log", xlabel="path length (blocks)", ylabel="gradient norm")
    if min_norm is not None:
        ax.set_ylim(bottom=min_norm)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_effective_window(
    frame: pd.DataFrame, quantity: str, ax: Axes | None = None, share: float = 0.95, paper: bool = False
) -> Axes:
    """A quantity's share at each path length, with its effective window shaded (Veit et al. 2016, figure 6c).

    Args:
        frame: From `resnet_paths.gradient_by_path_length`.
        quantity: The column to draw, as a share of its sum; see `resnet_paths.effective_window`.
        ax: The axes to draw into; the current axes if None.
        share: Share of the total in the shaded window.
        paper: Whether to mark the paper's window of 5 to 17 blocks, measured in a network of 54 blocks.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If the column is missing or has no positive sum, or a length occurs twice.
    """
    frame = checked("frame", frame, quantity, ["path_length"], ["path_length"])
    window = effective_window(frame, quantity, share)
    ax = axes_of(ax)
    total = frame[quantity].sum()
    low, high = window.shortest - 0.5, window.longest + 0.5
    ax.axvspan(low, high, color="0.9", zorder=0)
    ax.bar(frame["path_length"], 100 * frame[quantity] / total, width=0.8, color="C0", zorder=2)
    error = frame.get(f"{quantity}_se")
    if error is not None:
        ax.errorbar(
            frame["path_length"],
            100 * frame[quantity] / total,
            yerr=100 * error / total,
            linestyle="none",
            color=INK,
            elinewidth=0.6,
            zorder=3,
        )
    if (frame[quantity] < 0).any():
        ax.axhline(0, color=INK, linewidth=0.5)
    if paper:
        ax.plot(PAPER_WINDOW, [1.02, 1.02], color=INK, linewidth=1, clip_on=False, transform=ax.get_xaxis_transform())
        ax.annotate(
            "paper: 5 to 17",
            (sum(PAPER_WINDOW) / 2, 1.03),
            xycoords=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize="small",
            color=INK,
        )
    ax.set_ylim(top=1.15 * ax.get_ylim()[1])  # room for the text, above all bars
    ax.annotate(
        f"{window.share:.0%} at {window.shortest} to {window.longest}",
        (0.98, 0.96),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize="small",
        color=INK,
    )
    ax.set(xlabel="path length (blocks)", ylabel=f"{_SHARES.get(quantity, quantity)} (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return ax


def plot_coherence(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Coherence of the gradients of the paths of one length: 1 if they are orthogonal.

    Args:
        frame: From `resnet_paths.gradient_by_path_length` with ``method="energy"``.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing or a length occurs twice.
    """
    frame = checked("frame", frame, "coherence", ["path_length"], ["coherence_se"]).sort_values("path_length")
    ax = axes_of(ax)
    ax.axhline(1, color=MUTED, linewidth=0.7, zorder=0)
    # The maximum, for equal gradients, is the square root of the number of paths.
    most = np.array([math.exp(min(math.log(count) / 2, 600.0)) for count in frame["num_paths"]])  # within a float
    ax.plot(frame["path_length"], most, color=MUTED, linewidth=0.7, linestyle="dashed", label="all paths equal")
    ax.errorbar(
        frame["path_length"],
        frame["coherence"],
        yerr=frame["coherence_se"],
        marker="o",
        markersize=2.5,
        linewidth=0.7,
        elinewidth=0.5,
        label="measured",
    )
    ax.set(yscale="log", xlabel="path length (blocks)", ylabel="coherence (1: orthogonal)")
    # The maximum is shown unless it is far above what is measured.
    highest = frame["coherence"].max()
    ax.set_ylim(0.5, 1.5 * most.max() if most.max() <= 10 * highest else 4 * highest)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_block_independence(independence: BlockIndependence, ax: Axes | None = None) -> Axes:
    """The share of the gradient at each path length, beside that of independent and of interacting blocks.

    Args:
        independence: From `resnet_paths.gradients.block_independence`.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If `independence` is something else.
    """
    if not isinstance(independence, BlockIndependence):
        raise ResnetPathsError(
            "independence", type(independence).__name__, "the result of resnet_paths.gradients.block_independence"
        )
    ax = axes_of(ax)
    laws = independence.laws
    ax.bar(laws["path_length"], 100 * laws["gradient_share"], width=0.8, color="0.8", label="gradient share")
    names = {
        "independent": f"independent blocks (distance {independence.total_variation:.2g})",
        "interacting": f"one interaction number ({independence.total_variation_interacting:.2g})",
    }
    for (name, label), marker, style in zip(names.items(), MARKERS, ("dashed", "solid"), strict=False):
        if laws[name].notna().all():
            ax.plot(
                laws["path_length"],
                100 * laws[name],
                marker=marker,
                markersize=2.5,
                linewidth=0.7,
                linestyle=style,
                label=label,
            )
    held = laws.loc[laws[["gradient_share", "independent"]].abs().max(axis=1) > 1e-3, "path_length"]
    if len(held):
        ax.set_xlim(held.min() - 1.5, held.max() + 1.5)
    ax.set(xlabel="path length (blocks)", ylabel="gradient share (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_pair_covariances(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Covariance of each pair of blocks, with lines where stages begin.

    Args:
        frame: From `resnet_paths.gradients.pair_covariances`. A block with itself is left out.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes, with a colour map; negative where paths that take one branch take the other less often. Colours end at
        the 2nd and the 98th percentile.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, a pair occurs twice, or there is no pair.
    """
    frame = checked("frame", frame, "covariance", ["first", "second"], ["first_stage", "second_stage"])
    ax = axes_of(ax)
    pairs = frame[frame["first"] != frame["second"]]
    if pairs.empty:
        raise ResnetPathsError("frame", f"{len(frame)} rows", "covariances of at least two blocks")
    both = pd.concat([pairs, pairs.rename(columns={"first": "second", "second": "first"})])
    blocks = np.union1d(pairs["first"], pairs["second"])
    table = both.pivot_table(index="first", columns="second", values="covariance").reindex(blocks, columns=blocks)
    draw_map(ax, blocks, blocks, table.to_numpy(), "covariance of two blocks", robust=True)
    stages = pd.concat([frame.set_index(name)[f"{name}_stage"] for name in ("first", "second")])
    stages = stages[~stages.index.duplicated()].sort_index()
    borders = stages.index[stages.ne(stages.shift()).to_numpy()][1:] - 0.5
    for border in borders:
        ax.axvline(border, color=INK, linewidth=0.5)
        ax.axhline(border, color=INK, linewidth=0.5)
    ax.set(xlabel="block (lines: stage borders)", ylabel="block", aspect="equal")
    return ax


def plot_path_shares(
    frame: pd.DataFrame, by: str, quantity: str = "gradient_share", ax: Axes | None = None, *, ordered: bool = False
) -> Axes:
    """A quantity's share at each path length: one line per network or per epoch of training.

    Args:
        frame: Concatenated frames of `resnet_paths.gradient_by_path_length`, with the column `by`.
        by: The column that distinguishes them, such as ``"network"`` or ``"epoch"``; it is named in the legend.
        quantity: The column to draw, as a share of its sum over lengths; with bars of one standard error if the frame
            has a column of these.
        ax: The axes to draw into; the current axes if None.
        ordered: Whether the values of `by` are ordered; the colours then range from light to dark.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, a length occurs twice in one group, or a sum is not positive.
    """
    frame = checked("frame", frame, quantity, [by, "path_length"])
    groups = groups_of(frame, [by], "path_length")
    for name, rows in groups:
        if not rows[quantity].sum() > 0:
            raise ResnetPathsError("quantity", quantity, f"a column with a positive sum at {by} {name}")
    ax = axes_of(ax)
    colours = sns.color_palette("crest", len(groups)) if ordered else [f"C{index}" for index in range(len(groups))]
    for (name, rows), marker, colour in zip(groups, cycle(MARKERS), colours, strict=False):
        percent = 100 / rows[quantity].sum()
        error = rows.get(f"{quantity}_se")
        ax.errorbar(
            rows["path_length"],
            percent * rows[quantity],
            yerr=None if error is None else percent * error,
            label=str(name),
            color=colour,
            marker=marker,
            markersize=2.5,
            linewidth=0.7,
            elinewidth=0.5,
        )
    if (frame[quantity] < 0).any():
        ax.axhline(0, color=INK, linewidth=0.5, zorder=0)
    ax.set(xlabel="path length (blocks)", ylabel=f"{_SHARES.get(quantity, quantity)} (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    legend_above(ax, ax.get_legend_handles_labels()[0])
    legend = ax.get_legend()
    if legend is not None and by is not None and by != "network":
        legend.set_title(by)
    return ax


def plot_windows(frame: pd.DataFrame, along: str, ax: Axes | None = None, *, num_blocks: int | None = None) -> Axes:
    """Effective windows: one bar per window from the shortest to the longest length, with a dot at the mean length.

    Args:
        frame: One row per window: ``shortest``, ``longest`` and ``peak`` of `resnet_paths.gradients.EffectiveWindow`,
            the column `along`, and optionally ``mean_path_length``; without it the dot is at the peak.
        along: The column on the horizontal axis, such as ``"epoch"`` or ``"network"``; evenly spaced, in the frame's
            order.
        ax: The axes to draw into; the current axes if None.
        num_blocks: Number of blocks; if given, a dotted line at half of it shows the mean length of all paths.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing or a value of `along` occurs twice.
    """
    dot = "mean_path_length" if "mean_path_length" in getattr(frame, "columns", ()) else "peak"
    frame = checked("frame", frame, dot, [along], ["shortest", "longest"])
    ax = axes_of(ax)
    places = range(len(frame))
    ax.bar(
        places,
        frame["longest"] - frame["shortest"] + 1,
        bottom=frame["shortest"] - 0.5,
        width=0.55,
        color="C0",
        alpha=0.35,
        label="effective window",
    )
    label = "mean length, weighted by the gradient" if dot == "mean_path_length" else "peak"
    ax.plot(places, frame[dot], marker="o", markersize=3.5, color="C0", linestyle="none", label=label)
    if num_blocks is not None:
        ax.axhline(num_blocks / 2, color=INK, linewidth=0.7, linestyle="dotted", label="mean length of all paths")
    ax.set_xticks(places, [str(value) for value in frame[along]])
    ax.set(xlabel=along, ylabel="path length (blocks)", ylim=(0, None))
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax

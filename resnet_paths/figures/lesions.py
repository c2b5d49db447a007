"""Figures of lesion studies (Veit et al. 2016, figures 3 to 5)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from resnet_paths._utils.arguments import require_choice, require_float, require_int, require_list
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures.layout import (
    INK,
    MARKERS,
    axes_of,
    checked,
    draw_map,
    groups_of,
    label_and_scale,
    legend_above,
    mark_stages,
    whole_numbers_from_zero,
)
from resnet_paths.lesions.frames import deletions_of

__all__ = [
    "plot_layer_schedules",
    "plot_lesion_counts",
    "plot_pair_interactions",
    "plot_predicted_effects",
    "plot_reorderings",
    "plot_scalings",
    "plot_score_correlations",
    "plot_single_deletions",
]

_SCORES = {
    "block_influence": "block influence (1 - cosine)",
    "angular_distance": "angular distance (fraction of 180°)",
    "relative_branch_norm": "norm of branch / norm of skip",
}
_EFFECTS = {"error_rate_increase": "error increase (points)", "cross_entropy": "cross-entropy (nats)"}
_TAU_BIN = 0.05


def plot_single_deletions(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    published: pd.DataFrame | None = None,
    stage_starts: Sequence[int] = (),
    chance: float | None = None,
    value: str = "error_rate",
) -> Axes:
    """Test error after deleting one block, against the block's index (Veit et al. 2016, figures 3 and 4).

    One line per network with bars of its 95 % intervals; the dashed line of the same colour is the value of the intact
    network. A row with NaN leaves a gap.

    Args:
        frame: From `resnet_paths.lesion_study` of `resnet_paths.single_deletions`: ``block_index`` counted from 0, and
            ``error_rate``, ``error_rate_low``, ``error_rate_high``, ``intact_error_rate``, or those of another measure;
            an optional column ``network`` separates several networks and names them in the legend.
        ax: The axes to draw into; the current axes if None.
        published: Results of the paper's authors, drawn in grey: ``network``, ``dataset``, ``block_index``, and in
            percent ``error_percent``, ``intact_error_percent``.
        stage_starts: Indices of the first blocks of stages, to be marked.
        chance: Error rate of guessing, in [0, 1].
        value: The measure, such as ``"perplexity"``; `published` and `chance` are of the error rate only.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, a block occurs twice in one network, or a rate is
            not in [0, 1].
    """
    quantity, scale = label_and_scale(value)
    if value != "error_rate" and not (published is None and chance is None):
        raise ResnetPathsError("value", value, "'error_rate' with published results or chance")
    by = ["network"] if isinstance(frame, pd.DataFrame) and "network" in frame else []
    low, high, intact = bounds = [f"{value}_low", f"{value}_high", f"intact_{value}"]
    frame = checked("frame", frame, value, [*by, "block_index"], bounds, rate=scale == 100)
    if published is not None:
        keys = ["network", "dataset", "block_index"]
        published = checked("published", published, "error_percent", keys, ["intact_error_percent"])
    if chance is not None and not 0 <= require_float("chance", chance, "an error rate in [0, 1]") <= 1:
        raise ResnetPathsError("chance", chance, "an error rate in [0, 1]")
    given = require_list("stage_starts", stage_starts, "a list of positions of blocks")
    starts = sorted(require_int("stage_starts", start, 0) for start in given)
    ax = axes_of(ax)
    handles: list[Artist] = []
    behind: list[Artist] = []
    style: dict[str, Any]
    if published is not None:
        greys = cycle(("0.5", "0.7", "0.6", "0.8"))
        for (name, rows), grey in zip(groups_of(published, ["network", "dataset"], "block_index"), greys, strict=False):
            label = f"Veit et al. 2016, {name[0]} ({name[1]})"
            style = {"color": grey, "linewidth": 0.7, "zorder": 1.5}
            behind += ax.plot(rows["block_index"], rows["error_percent"], label=label, **style)
            _intact_line(ax, rows["block_index"], rows["intact_error_percent"], style)
    networks = groups_of(frame, by, "block_index")
    for index, ((network, rows), marker) in enumerate(zip(networks, cycle(MARKERS), strict=False)):
        x, colour = rows["block_index"], f"C{index}"
        ax.vlines(x, scale * rows[low], scale * rows[high], color=colour, linewidth=0.8)
        style = {"color": colour, "linewidth": 0.8}
        # The line has a gap at blocks that could not be deleted.
        curve = rows.set_index("block_index")[value].reindex(range(int(x.min()), int(x.max()) + 1))
        name = "one block deleted" if network is None else str(network)
        handles += ax.plot(curve.index, scale * curve, marker=marker, markersize=2.5, label=name, **style)
        _intact_line(ax, x, scale * rows[intact], style)
    handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=0.8, label="intact"))
    if chance is not None:
        _chance_line(ax, 100 * chance)
    ax.set(xlabel="deleted block (index from 0)", ylabel="test error (%)" if value == "error_rate" else quantity)
    last = max(data["block_index"].max() for data in (frame, published) if data is not None)
    ax.set_xlim(-0.8, last + 0.8)
    if scale == 100:
        ax.set_ylim(0, min(ax.get_ylim()[1], 102))
    whole_numbers_from_zero(ax)
    if starts:
        mark_stages(ax, starts)
    legend_above(ax, behind, handles, gap_points=11 if starts else 3)
    return ax


def plot_lesion_counts(frame: pd.DataFrame, ax: Axes | None = None, published: pd.DataFrame | None = None) -> Axes:
    """Test error against the number of blocks deleted at once, or duplicated (Veit et al. 2016, figure 5a).

    One faint dot per lesion; the line is their median, with bars from the first to the third quartile.

    Args:
        frame: From `resnet_paths.lesion_study`: ``num_blocks``, ``error_rate`` in [0, 1]; an optional column
            ``network`` separates several networks.
        ax: The axes to draw into; the current axes if None.
        published: Results of the paper's authors, drawn in grey: ``network``, ``dataset``, ``num_blocks``, and
            in percent ``error_percent_q25``, ``error_percent_median``, ``error_percent_q75``.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, a rate is not in [0, 1], or a row has no
            ``num_blocks``, such as that of a lesion given as a function.
    """
    ax = _plot_quartiles(frame, "num_blocks", ax, published, "num_blocks")
    ax.set(xlabel="number of blocks", ylabel="test error (%)")
    whole_numbers_from_zero(ax)
    return ax


def plot_reorderings(frame: pd.DataFrame, ax: Axes | None = None, published: pd.DataFrame | None = None) -> Axes:
    """Test error against Kendall's tau of the order of the blocks with the intact one (Veit et al. 2016, figure 5b).

    One faint dot per lesion; the line is the median of the lesions within 0.025 of each multiple of 0.05, with bars
    from the first to the third quartile. Disorder increases to the right.

    Args:
        frame: From `resnet_paths.lesion_study`: ``kendall_tau``, ``error_rate`` in [0, 1]; an optional column
            ``network`` separates several networks.
        ax: The axes to draw into; the current axes if None.
        published: Results of the paper's authors, drawn in grey: ``network``, ``dataset``, ``kendall_tau_bin``,
            and in percent ``error_percent_q25``, ``error_percent_median``, ``error_percent_q75``.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, a rate is not in [0, 1], or a row has no
            ``kendall_tau``, such as that of a lesion given as a function.
    """
    ax = _plot_quartiles(frame, "kendall_tau", ax, published, "kendall_tau_bin", bin_width=_TAU_BIN)
    ax.set(xlabel="Kendall's tau of the order of blocks", ylabel="test error (%)", ylim=(0, None))
    ax.xaxis.set_inverted(True)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))  # labels of three digits would overlap
    return ax


def plot_layer_schedules(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Test error of each schedule of the middle blocks: one mark per network, with its 95 % interval.

    Args:
        frame: From `resnet_paths.lesion_study` of `resnet_paths.layer_schedules`: ``lesion``, and in [0, 1]
            ``error_rate``, ``error_rate_low``, ``error_rate_high``, ``intact_error_rate``; an optional column
            ``network`` separates several networks.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes; the first schedule is on top.

    Raises:
        ResnetPathsError: If columns are missing, a rate is not in [0, 1], or a schedule occurs twice in one network.
    """
    by = ["network"] if isinstance(frame, pd.DataFrame) and "network" in frame else []
    bounds = ["error_rate_low", "error_rate_high", "intact_error_rate"]
    frame = checked("frame", frame, "error_rate", [*by, "lesion"], bounds, rate=True)
    ax = axes_of(ax)
    names = list(frame["lesion"].unique())
    networks = list(frame.groupby(by, sort=False)) if by else [((None,), frame)]
    handles: list[Artist] = []
    for index, (((network,), rows), marker) in enumerate(zip(networks, cycle(MARKERS), strict=False)):
        # Networks side by side within the row of a schedule.
        y = rows["lesion"].map(names.index) + 0.18 * (index - (len(networks) - 1) / 2)
        colour, label = f"C{index}", "schedule" if network is None else str(network)
        ax.hlines(y, 100 * rows["error_rate_low"], 100 * rows["error_rate_high"], color=colour, linewidth=0.8)
        handles += ax.plot(100 * rows["error_rate"], y, marker=marker, linestyle="none", color=colour, label=label)
        for intact in rows["intact_error_rate"].unique():
            ax.axvline(100 * intact, color=colour, linestyle="--", linewidth=0.8, zorder=1)
    handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=0.8, label="intact"))
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="test error (%)", xlim=(0, 101), ylim=(len(names) - 0.5, -0.5))
    legend_above(ax, handles)
    return ax


def plot_pair_interactions(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Interaction of deletions: the error increase of each pair of blocks minus the sum of both single increases.

    Args:
        frame: From `resnet_paths.pair_interactions`: ``first``, ``second``, ``interaction`` in [-1, 1].
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes, with a colour map in points of error; positive where blocks replace each other.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, or a pair occurs twice.
    """
    frame = checked("frame", frame, "interaction", ["first", "second"])
    ax = axes_of(ax)
    blocks = np.union1d(frame["first"], frame["second"])
    both = pd.concat([frame, frame.rename(columns={"first": "second", "second": "first"})])
    table = 100 * both.pivot_table(index="first", columns="second", values="interaction").reindex(
        blocks, columns=blocks
    )
    draw_map(ax, blocks, blocks, table.to_numpy(), "interaction (points of error)")
    ax.set(xlabel="deleted block", ylabel="deleted block", aspect="equal")
    return ax


def plot_predicted_effects(
    predicted: pd.DataFrame,
    study: pd.DataFrame,
    score: str,
    ax: Axes | None = None,
    effect: str = "error_rate_increase",
) -> Axes:
    """Measured effect of deleting each block against a score that predicts it, with bars of one standard error.

    Args:
        predicted: From `resnet_paths.predicted_effects`.
        study: From `resnet_paths.lesion_study` with deletions of these blocks or ranges; other rows are ignored.
        score: ``"block_influence"``, ``"angular_distance"``, ``"relative_branch_norm"``, or the first-order estimate
            of a measure, such as ``"first_order_cross_entropy_increase"``.
        ax: The axes to draw into; the current axes if None.
        effect: ``"error_rate_increase"``, drawn in points, or ``"cross_entropy"``.

    Returns:
        The axes; blocks are numbered if there are at most twelve.

    Raises:
        ResnetPathsError: If the score or the effect is unknown, columns are missing, or the frame concatenates two
            studies.
    """
    label = _score_label(score)
    require_choice("effect", effect, _EFFECTS)
    predicted = checked("predicted", predicted, score, ["blocks"], [f"{score}_se", "num_blocks", "block_index"])
    spans = predicted["num_blocks"].unique().tolist()
    if len(spans) > 1:
        raise ResnetPathsError("predicted", f"ranges of {spans} blocks", "the rows of one span")
    deleted = checked("study", deletions_of("study", study, spans[0], [effect]), effect, ["blocks"])
    both = predicted.merge(deleted[["blocks", effect]], on="blocks")
    ax = axes_of(ax)
    y = both[effect] * (100 if effect == "error_rate_increase" else 1)
    ax.errorbar(both[score], y, xerr=both[f"{score}_se"], linestyle="none", marker="o", markersize=2.5, elinewidth=0.5)
    if len(both) <= 12:
        for x, height, index in zip(both[score], y, both["block_index"], strict=True):
            ax.annotate(str(index), (x, height), (3, 2), textcoords="offset points", fontsize="small", color=INK)
    ax.set(xlabel=label, ylabel=_EFFECTS[effect])
    return ax


def plot_score_correlations(frame: pd.DataFrame, ax: Axes | None = None, effect: str = "cross_entropy") -> Axes:
    """Rank correlation of each cheap score with the effect of a deletion, with 95 % intervals over blocks.

    Args:
        frame: From `resnet_paths.lesions.score_correlations`; a column ``network`` gives each of several networks a
            row.
        ax: The axes to draw into; the current axes if None.
        effect: ``"cross_entropy"`` or ``"error_rate_increase"``.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If the effect is unknown or not in the frame, columns are missing, or a score occurs twice for
            one network.
    """
    require_choice("effect", effect, _EFFECTS)
    several = isinstance(frame, pd.DataFrame) and "network" in frame
    keys = ["score", "effect", *(["network"] if several else [])]
    frame = checked("frame", frame, "spearman", keys, ["spearman_low", "spearman_high"])
    rows = frame[frame["effect"] == effect]
    require_choice("effect", effect, frame["effect"].unique())
    networks = rows["network"] if several else pd.Series("", rows.index)
    places = pd.Series(range(networks.nunique()), networks.unique())
    scores = list(rows["score"].unique())
    ax = axes_of(ax)
    for number, (score, marker) in enumerate(zip(scores, cycle(MARKERS), strict=False)):
        of_score = rows[rows["score"] == score]
        x = of_score["spearman"]
        y = networks[of_score.index].map(places) + 0.7 * ((number + 0.5) / len(scores) - 0.5)
        ends = (x - of_score["spearman_low"], of_score["spearman_high"] - x)
        label = _score_label(score)
        ax.errorbar(x, y, xerr=ends, linestyle="none", marker=marker, markersize=2.5, elinewidth=0.5, label=label)
    ax.axvline(0, color=INK, linewidth=0.5, zorder=0.5)
    ax.set(xlabel=f"rank correlation with the {_EFFECTS[effect].split(' (')[0]} without the block", ylabel="")
    ax.set_yticks(places.to_numpy(), places.index.to_list())
    ax.set_xlim(-1.05, 1.05)
    ax.set_ylim(len(places) - 0.5, -0.5)
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_scalings(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Test error against the factor on a branch: one line per block, with its 95 % interval.

    Args:
        frame: From `resnet_paths.lesion_study` of `resnet_paths.scalings`, with columns ``block`` (name) and ``factor``
            beside ``error_rate``, ``error_rate_low``, ``error_rate_high`` and ``intact_error_rate`` in [0, 1].
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, a factor occurs twice for one block, or a rate is not in [0, 1].
    """
    bounds = ["error_rate_low", "error_rate_high", "intact_error_rate"]
    frame = checked("frame", frame, "error_rate", ["block", "factor"], bounds, rate=True)
    ax = axes_of(ax)
    for intact in frame["intact_error_rate"].unique():
        ax.axhline(100 * intact, color=INK, linestyle="--", linewidth=0.7, zorder=1, label="intact")
    for (block, rows), marker in zip(groups_of(frame, ["block"], "factor"), cycle(MARKERS), strict=False):
        percent = 100 * rows["error_rate"]
        error = (percent - 100 * rows["error_rate_low"], 100 * rows["error_rate_high"] - percent)
        ax.errorbar(
            rows["factor"],
            percent,
            yerr=error,
            marker=marker,
            markersize=2.5,
            linewidth=0.8,
            elinewidth=0.5,
            label=str(block),
        )
    ax.set(xlabel="factor on the branch", ylabel="test error (%)")
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=min(0, ax.get_xlim()[0]))
    handles, labels = ax.get_legend_handles_labels()
    legend_above(ax, list(dict(zip(labels, handles, strict=True)).values()))
    return ax


def _score_label(score: str) -> str:
    """The label of an axis for a column of `resnet_paths.predicted_effects`."""
    measure = str(score).removeprefix("first_order_").removesuffix("_increase")
    if str(score) == f"first_order_{measure}_increase":
        return f"first-order increase of the {label_and_scale(measure)[0]}"
    require_choice("score", score, (*_SCORES, "first_order_cross_entropy_increase"))
    return _SCORES[score]


def _plot_quartiles(
    frame: pd.DataFrame,
    along: str,
    ax: Axes | None,
    published: pd.DataFrame | None,
    published_along: str,
    bin_width: float | None = None,
) -> Axes:
    """Dots, medians and quartiles of the error in percent against a column; published results in grey."""
    by = ["network"] if isinstance(frame, pd.DataFrame) and "network" in frame else []
    columns = [*by, along, "error_rate"]
    # Several lesions may have equal values: rows are identified by their number.
    numbered = frame.reset_index(drop=True).reset_index() if isinstance(frame, pd.DataFrame) else frame
    frame = checked("frame", numbered, "error_rate", ["index", *columns[:-1]], rate=True)
    quartiles = [f"error_percent_{name}" for name in ("median", "q25", "q75")]
    if published is not None:
        names = ["network", "dataset", published_along]
        published = checked("published", published, quartiles[0], names, quartiles[1:])
    ax = axes_of(ax)
    behind: list[Artist] = []
    if published is not None:
        greys = cycle(("0.5", "0.7", "0.6"))
        groups = groups_of(published, ["network", "dataset"], published_along)
        for (name, rows), grey in zip(groups, greys, strict=False):
            x = rows[published_along]
            label = f"Veit et al. 2016, {name[0]} ({name[1]})"
            behind += ax.plot(x, rows[quartiles[0]], color=grey, linewidth=0.8, zorder=1.5, label=label)
            ax.fill_between(x, rows[quartiles[1]], rows[quartiles[2]], color=grey, alpha=0.25, linewidth=0, zorder=1)
    handles: list[Artist] = []
    networks = groups_of(frame, by, along)
    for index, ((network, rows), marker) in enumerate(zip(networks, cycle(MARKERS), strict=False)):
        percent, colour = 100 * rows["error_rate"], f"C{index}"
        place = rows[along] if bin_width is None else bin_width * (rows[along] / bin_width).round()
        low, middle, high = (percent.groupby(place).quantile(share) for share in (0.25, 0.5, 0.75))
        ax.scatter(rows[along], percent, s=2, color=colour, alpha=0.25, linewidths=0, zorder=1.8)
        ax.vlines(middle.index, low, high, color=colour, linewidth=1.2)
        label = "median and quartiles" if network is None else str(network)
        handles += ax.plot(
            middle.index, middle, marker=marker, markersize=2.5, color=colour, linewidth=0.8, label=label
        )
    legend_above(ax, behind, handles)
    return ax


def _chance_line(ax: Axes, percent: float) -> None:
    """A dotted line at the error of guessing."""
    ax.axhline(percent, color=INK, linestyle=":", linewidth=0.8, zorder=1)
    # Below the line if chance is near 100 %, where there is no room above it.
    above = percent <= 90
    ax.annotate(
        "chance",
        (1, percent),
        xycoords=("axes fraction", "data"),
        xytext=(0, 1 if above else -1),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        fontsize="small",
        color=INK,
    )
    ax.set_ylim(top=max(ax.get_ylim()[1], percent + 12))


def _intact_line(ax: Axes, x: pd.Series[float], percent: pd.Series[float], style: dict[str, Any]) -> None:
    """A dashed line at the intact error of each network, along its blocks."""
    ax.hlines(percent.dropna().unique(), x.min() - 0.5, x.max() + 0.5, linestyles="dashed", **style)

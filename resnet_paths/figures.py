"""Figures for a paper: a frame goes in, Axes come out, and a file is as wide as the column it stands in.

    with rp.figures.paper_style("single"):
        fig, ax = plt.subplots()
        rp.figures.plot_path_histogram(rp.path_histogram(54), ax)
        rp.figures.save_figure(fig, "figures/paths", data=rp.path_histogram(54))

Make, plot and save inside the ``with``: matplotlib looks some settings up only when it draws. Networks differ by marker
or dashes as well as by colour, so that every figure can be read in grey. Every function checks what it is given before
it draws, and draws the numbers as they are in the frame: nothing is smoothed, estimated or left out here.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path as Curve
from matplotlib.ticker import MaxNLocator

from resnet_paths.errors import ResnetPathsError
from resnet_paths.files import write_then_rename
from resnet_paths.paths import check_path

if TYPE_CHECKING:
    from matplotlib.artist import Artist

__all__ = [
    "paper_style", "plot_path_histogram", "plot_single_deletions", "plot_training_curves", "plot_unraveled_graph",
    "save_figure",
]  # fmt: skip

COLUMN_INCHES = {"single": 3.25, "double": 6.75}
"""Width of a column and of the whole text in the ICML style."""

# Every key is set to None, so that matplotlib writes no date and no version of itself.
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
    "svg": dict.fromkeys(("Creator", "Date")),
    "png": {"Software": None},
}
# TrueType in PDF, as publishers ask; SVG text as outlines, so that it looks the same where the font is not installed.
_EXPORT = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "resnet_paths"}
_MARKERS = "osD^vP"
_INK, _MUTED = "0.2", "0.75"
_CURVE_LABELS = {
    "train_loss": "training loss (nats)", "train_error_rate": "training error (%)",
    "test_loss": "test loss (nats)", "test_error_rate": "test error (%)",
}  # fmt: skip


def paper_style(
    column: Literal["single", "double"] | float = "single", aspect: float = 0.62
) -> AbstractContextManager[None]:
    """Settings for figures that stand in a paper at their own size: nothing is scaled, 8 pt is 8 pt.

    Args:
        column: ``"single"`` (3.25 in, the column of the ICML style), ``"double"`` (6.75 in, its text width), or a width
            in inches.
        aspect: Height over width.

    Returns:
        A context manager that sets matplotlib's settings and restores them.

    Raises:
        ResnetPathsError: If `column` or `aspect` is not one of these, or not positive.

    Example:
        >>> with paper_style("single"):
        ...     [round(float(inches), 3) for inches in mpl.rcParams["figure.figsize"]]
        [3.25, 2.015]
    """
    width = COLUMN_INCHES.get(column) if isinstance(column, str) else column
    if not _is_positive(width):
        raise ResnetPathsError("column", column, "'single', 'double', or a width in inches above 0")
    if not _is_positive(aspect):
        raise ResnetPathsError("aspect", aspect, "a ratio of height to width above 0")
    assert width is not None  # held by _is_positive
    small = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), 7.0)
    large = dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "figure.titlesize"), 8.0)
    settings: dict[str, Any] = {
        **sns.axes_style("ticks", rc={"axes.spines.top": False, "axes.spines.right": False}),
        **sns.plotting_context("paper", rc=small | large),
        **_EXPORT,
        "axes.linewidth": 0.6,
        "axes.prop_cycle": mpl.cycler(color=sns.color_palette("colorblind")),
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.02,
        "figure.constrained_layout.w_pad": 0.02,
        "figure.dpi": 150,
        "figure.figsize": (float(width), float(width) * aspect),
        # The font that comes with matplotlib: the same figure, and the same bytes, on every machine.
        "font.family": "DejaVu Sans",
        "legend.frameon": False,
        "lines.linewidth": 1.0,
        "lines.markersize": 3.0,
        "savefig.bbox": None,
        "savefig.dpi": 300,
        **{f"{axis}tick.major.{key}": value for axis in "xy" for key, value in (("width", 0.6), ("size", 2.5), ("pad", 2))},
    }
    return mpl.rc_context(settings)  # type: ignore[arg-type]


def save_figure(fig: Figure, stem: str | Path, data: pd.DataFrame | None = None) -> list[Path]:
    """Write a figure as PDF, SVG and PNG (300 dots an inch), and the frame behind it as CSV.

    The page is exactly as wide as the figure; PDF fonts are embedded as TrueType. The same figure gives the same bytes:
    no date and no version is written. All files take their places together once all are written; if one fails, what
    stood there before is still there.

    Args:
        fig: The figure.
        stem: Path without suffix; its folder is created.
        data: The frame that the figure shows, if it is to lie beside it.

    Returns:
        The paths written: ``.pdf``, ``.svg``, ``.png`` and, with `data`, ``.csv``.

    Raises:
        ResnetPathsError: If `fig` is not a figure, `data` not a frame, or `stem` has one of the suffixes or no name.
    """
    if not isinstance(fig, Figure):
        raise ResnetPathsError("fig", type(fig).__name__, "a matplotlib Figure", "Of Axes, pass ax.figure.")
    if data is not None and not isinstance(data, pd.DataFrame):
        raise ResnetPathsError("data", type(data).__name__, "a pandas DataFrame, or None")
    stem = Path(stem)
    suffixes = [f".{kind}" for kind in _METADATA] + [".csv"]
    if not stem.name or stem.name == ".." or stem.suffix.lower() in suffixes:
        raise ResnetPathsError(
            "stem", str(stem), f"a path that ends in a name without {', '.join(suffixes)}",
            "One file of each kind is written.",
        )  # fmt: skip
    contents: dict[str, bytes] = {}
    # Also for figures that were not made in `paper_style`; its tight box would change the width of the page.
    with mpl.rc_context({**_EXPORT, "savefig.bbox": None}):  # type: ignore[arg-type]
        for kind, metadata in _METADATA.items():
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, dpi=300, metadata=metadata)
            contents[kind] = buffer.getvalue()
    if data is not None:
        contents["csv"] = data.to_csv(index=False, lineterminator="\n").encode()
    # Not with_suffix, which would take "fig1.5" for "fig1".
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in contents]
    with contextlib.ExitStack() as unfinished:
        for path, content in zip(paths, contents.values(), strict=True):
            unfinished.enter_context(write_then_rename(path)).write_bytes(content)
    return paths


def plot_path_histogram(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of the paths at each path length (Veit et al. 2016, figure 6a): bars, or a marked line a network.

    Args:
        frame: From `resnet_paths.path_histogram`: ``path_length``, ``fraction``; several of them joined have a column
            ``network``, which names them in the legend.
        ax: Where to draw; the current axes if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, no row has a number, or a length occurs twice in one network.
    """
    by = ["network"] if isinstance(frame, pd.DataFrame) and "network" in frame else []
    frame = _checked("frame", frame, "fraction", [*by, "path_length"], rate=True)
    ax = plt.gca() if ax is None else ax
    groups = list(frame.groupby("network", sort=False)) if by else [(None, frame)]
    for index, ((network, rows), marker) in enumerate(zip(groups, cycle(_MARKERS), strict=False)):
        x, y, colour = rows["path_length"], 100 * rows["fraction"], f"C{index}"
        if len(groups) == 1:
            ax.bar(x, y, width=0.8, color=colour, label=network)
        else:
            ax.plot(x, y, marker=marker, color=colour, label=network, linewidth=0.7)
    ax.set(xlabel="path length (blocks)", ylabel="paths (%)")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if by:
        _legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_single_deletions(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    published: pd.DataFrame | None = None,
    stage_starts: Sequence[int] = (),
    chance: float | None = None,
) -> Axes:
    """Test error after deleting one block, against the block's index (Veit et al. 2016, figures 3 and 4).

    A marked line with interval bars a network; its error when intact is the dashed line of the same colour. A row
    without a number leaves a gap.

    Args:
        frame: A row a deleted block: ``network``, ``block_index`` counted from 0, and in [0, 1] ``error_rate``,
            ``error_rate_low``, ``error_rate_high``, ``intact_error_rate``.
        ax: Where to draw; the current axes if None.
        published: Results of the paper's authors, drawn in grey behind: ``network``, ``dataset``, ``block_index``,
            and in percent ``error_percent``, ``intact_error_percent``.
        stage_starts: Indices of blocks to mark, the first ones of their stages.
        chance: Error rate of guessing, in [0, 1].

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, no row has a number, a block occurs twice in one network, or a rate is
            not in [0, 1].
    """
    keys = ["network", "block_index"]
    bounds = ["error_rate_low", "error_rate_high", "intact_error_rate"]
    frame = _checked("frame", frame, "error_rate", keys, bounds, rate=True)
    if published is not None:
        published = _checked("published", published, "error_percent", [*keys, "dataset"], ["intact_error_percent"])
    if chance is not None and not 0 <= chance <= 1:
        raise ResnetPathsError("chance", chance, "an error rate in [0, 1]")
    ax = plt.gca() if ax is None else ax
    handles: list[Artist] = []
    behind: list[Artist] = []
    if published is not None:
        greys = cycle(("0.5", "0.7", "0.6", "0.8"))
        groups = published.groupby(["network", "dataset"], sort=False)
        for ((network, dataset), rows), grey in zip(groups, greys, strict=False):
            label = f"Veit et al. 2016, {network} ({dataset})"
            style: dict[str, Any] = {"color": grey, "linewidth": 0.6, "zorder": 1.5}
            behind += ax.plot(rows["block_index"], rows["error_percent"], label=label, **style)
            _intact_line(ax, rows["block_index"], rows["intact_error_percent"], style)
    for index, ((network, rows), marker) in enumerate(
        zip(frame.groupby("network", sort=False), cycle(_MARKERS), strict=False)
    ):
        x, colour = rows["block_index"], f"C{index}"
        ax.vlines(x, 100 * rows["error_rate_low"], 100 * rows["error_rate_high"], color=colour, linewidth=0.8)
        handles += ax.plot(x, 100 * rows["error_rate"], marker=marker, color=colour, linewidth=0.8, label=str(network))
        _intact_line(ax, x, 100 * rows["intact_error_rate"], {"color": colour, "linewidth": 0.8})
    handles.append(Line2D([], [], color=_INK, linestyle="--", linewidth=0.8, label="intact"))
    if chance is not None:
        ax.axhline(100 * chance, color=_INK, linestyle=":", linewidth=0.8, zorder=1)
        # No room above the line where chance is near 100 %: then below it.
        above = chance <= 0.92
        ax.annotate(
            "chance", (1, 100 * chance), xycoords=("axes fraction", "data"), xytext=(0, 1 if above else -1),
            textcoords="offset points", ha="right", va="bottom" if above else "top", fontsize="small", color=_INK,
        )  # fmt: skip
    top = max(ax.get_ylim()[1], 0 if chance is None else 100 * chance + 8)
    ax.set_ylim(0, min(top, 101))
    ax.set(xlabel="deleted block (index from 0)", ylabel="test error (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(stage_starts):
        _mark_stages(ax, sorted(stage_starts))
    _legend_above(ax, [*handles, *behind], strip=1.5 if len(stage_starts) else 0.4)
    return ax


def plot_unraveled_graph(graph: nx.DiGraph, ax: Axes | None = None, highlight: Sequence[int] | None = None) -> Axes:
    """All paths as a tree from left to right that joins in one sum (Veit et al. 2016, figure 1b).

    A line with a box goes through a branch, labelled as in the paper from $f_1$ on (block 0 is $f_1$); a plain line is a
    skip. At each split the skip goes up and the branches down, so that the top path takes no branch and the bottom path
    all of them. Boxes shrink as paths get many and lose their labels where these could not be read: beyond 32 paths
    always.

    Args:
        graph: From `resnet_paths.unraveled_graph`.
        ax: Where to draw; the current axes if None.
        highlight: One path, an entry a block, to draw in a strong colour with the others muted.

    Returns:
        The axes, without frame.

    Raises:
        ResnetPathsError: If `graph` is not such a graph or `highlight` not one of its paths.
    """
    offered = _offered(graph)
    route: set[Any] = set()
    if highlight is not None:
        path = check_path([tuple(entries) for entries in offered], highlight)
        route = {"input", "output", *(path[: i + 1] for i in range(len(path)))}
    ax = plt.gca() if ax is None else ax
    ax.set_axis_off()
    num_blocks = len(offered)
    leaves = list(graph.predecessors("output"))
    height = {leaf: -float(index) for index, leaf in enumerate(leaves)}
    for node in reversed(list(nx.topological_sort(graph))):
        if node != "output" and node not in height:
            height[node] = float(np.mean([height[child] for child in graph.successors(node)]))
    height["output"] = height["input"]
    stub = 0.7
    ax.set(xlim=(-stub - 0.1, num_blocks + 1 + stub + 0.1), ylim=(-len(leaves) + 0.3, 0.7))
    # Labels have a size in points: lay the figure out to know how many a row has.
    ax.figure.canvas.figure.draw_without_rendering()
    row_points = ax.bbox.height / ax.figure.dpi * 72 / len(leaves)
    most_branches = max((sum(map(bool, entries)) for entries in offered), default=0)
    font_points = min(mpl.rcParams["font.size"], row_points * (0.8 if most_branches < 2 else 0.6))
    labelled = len(leaves) <= 32 and font_points >= 4

    layers: dict[bool, list[Curve]] = {False: [], True: []}
    for tail, head, edge in graph.edges(data=True):
        x, on = graph.nodes[tail]["depth"], tail in route and head in route
        layers[on].append(_edge_curve(x, height[tail], height[head], joins=head == "output"))
        if edge["choice"]:
            _draw_box(
                ax, (x + 0.72, height[head]), on, muted=bool(route),
                label=_branch_label(edge["block"], edge["choice"], offered) if labelled else None,
                points=font_points if labelled else min(0.8 * row_points, 4.0),
            )  # fmt: skip
    middle = height["input"]
    layers[bool(route)] += [Curve([(a, middle), (b, middle)]) for a, b in ((-stub, 0), (num_blocks + 1, num_blocks + 1 + stub))]
    for on, curves in layers.items():
        colour = "C0" if on else _MUTED if route else _INK
        lines = PathCollection(
            curves, facecolors="none", edgecolors=colour, linewidths=1.8 if on else 0.8,
            zorder=2 if on else 1, transform=ax.transData,
        )  # fmt: skip
        lines.set_gid("highlighted-route" if on else "routes")
        ax.add_collection(lines, autolim=False)
    colour = "C0" if route else _INK
    ax.plot([0], [middle], marker="o", color=colour, markersize=3, zorder=4)
    ax.plot([num_blocks + 1], [middle], marker="o", markersize=9, color="white", markeredgecolor=colour, zorder=4)
    ax.plot([num_blocks + 1], [middle], marker="+", markersize=6, color=colour, zorder=5)
    for x, name in ((-stub / 2 - 0.05, "input"), (num_blocks + 1 + stub / 2 + 0.05, "output")):
        ax.annotate(name, (x, middle), (0, 5), textcoords="offset points", ha="center", va="bottom", fontsize="small")
    return ax


def plot_training_curves(frame: pd.DataFrame, ax: Axes | None = None, value: str = "test_error_rate") -> Axes:
    """A quantity of training against the epoch: the mean over seeds, in a band from the smallest to the largest.

    Args:
        frame: A row an epoch: ``network``, ``seed``, ``epoch`` and the column `value`.
        ax: Where to draw; the current axes if None.
        value: ``"train_loss"``, ``"train_error_rate"``, ``"test_loss"`` or ``"test_error_rate"``; rates are drawn in
            percent.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If `value` is another, columns are missing, no row has a number, an epoch occurs twice in one
            run, or a rate is not in [0, 1].
    """
    if value not in _CURVE_LABELS:
        raise ResnetPathsError("value", value, f"one of {', '.join(map(repr, _CURVE_LABELS))}")
    rate = value.endswith("_rate")
    frame = _checked("frame", frame, value, ["network", "seed", "epoch"], rate=rate)
    ax = plt.gca() if ax is None else ax
    sns.lineplot(
        frame.assign(**{value: frame[value] * (100 if rate else 1)}), x="epoch", y=value, hue="network", style="network",
        palette=[f"C{index}" for index in range(frame["network"].nunique())], errorbar=("pi", 100), ax=ax,
    )  # fmt: skip
    ax.set(xlabel="epoch", ylabel=_CURVE_LABELS[value])
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < float("inf")


def _checked(
    argument: str, frame: pd.DataFrame, value: str, keys: Sequence[str], others: Sequence[str] = (), *, rate: bool = False
) -> pd.DataFrame:
    """`frame` sorted along its last numeric key, once all it needs is known to be there."""
    needed = [*keys, value, *others]
    if not isinstance(frame, pd.DataFrame):
        raise ResnetPathsError(argument, type(frame).__name__, f"a pandas DataFrame with columns {', '.join(needed)}")
    missing = [name for name in needed if name not in frame]
    if missing:
        raise ResnetPathsError(
            argument, f"columns {', '.join(map(str, frame.columns)) or '(none)'}", f"columns {', '.join(needed)}",
            f"Missing: {', '.join(missing)}.",
        )  # fmt: skip
    if not frame[value].notna().any():
        raise ResnetPathsError(argument, f"{len(frame)} rows", f"at least one row with a number in {value}")
    twice = frame[frame.duplicated(list(keys))]
    if len(twice):
        names = ", ".join(keys)
        raise ResnetPathsError(
            argument, f"{len(twice)} rows that repeat another, first {twice[list(keys)].iloc[0].to_dict()}",
            f"one row for each {names}", "Name different networks in a column network." if "network" not in keys else "",
        )  # fmt: skip
    for name in (value, *others) if rate else ():
        wrong = frame.loc[(frame[name] < 0) | (frame[name] > 1), name]
        if len(wrong):
            raise ResnetPathsError(f"{argument}[{name!r}]", wrong.iloc[0], "a rate in [0, 1]", "Percent is not a rate.")
    along = next(key for key in ("block_index", "path_length", "epoch") if key in keys)
    return frame.sort_values(along, kind="stable") if along not in keys[:1] else frame.sort_values(along)


def _legend_above(ax: Axes, handles: Sequence[Artist], strip: float = 0.4) -> None:
    """A legend above the axes, where it hides no data, in as many columns as fit into their width."""
    labels = [str(handle.get_label()) for handle in handles]
    for columns in range(len(labels), 0, -1):
        legend = ax.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, title=None, borderaxespad=strip,
            borderpad=0, labelspacing=0.3, handlelength=2.0, handletextpad=0.5, columnspacing=1.2,
        )  # fmt: skip
        if legend.get_window_extent().width <= ax.bbox.width:
            return


def _intact_line(ax: Axes, x: pd.Series[Any], percent: pd.Series[Any], style: dict[str, Any]) -> None:
    """A dashed line at each intact error there is (one a network) along the network's blocks."""
    ax.hlines(percent.dropna().unique(), x.min() - 0.5, x.max() + 0.5, linestyles=[(0, (4, 2))], **style)


def _mark_stages(ax: Axes, starts: Sequence[int]) -> None:
    """Thin lines with a mark on top, and one label where there is most room between them."""
    along = ax.get_xaxis_transform()
    ax.vlines(starts, 0, 1, color=_MUTED, linewidth=0.5, zorder=0.5, transform=along)
    ax.plot(
        starts, [1.0] * len(starts), linestyle="none", marker="v", markersize=3, color=_INK, clip_on=False, transform=along
    )
    gaps = np.diff([*starts, ax.get_xlim()[1]])
    ax.annotate(
        "stage starts", (starts[int(np.argmax(gaps))], 1), xycoords=along, xytext=(4, 0), textcoords="offset points",
        va="bottom", fontsize="small", color=_INK,
    )  # fmt: skip


def _offered(graph: nx.DiGraph) -> list[list[int]]:
    """The entries that each block offers, read off the edges; refuses what is not an unraveled graph."""
    allowed, advice = "a graph from resnet_paths.unraveled_graph", "Call unraveled_graph(3), for example."
    if not isinstance(graph, nx.DiGraph) or not {"input", "output"} <= set(graph):
        raise ResnetPathsError("graph", graph, allowed, advice)
    entries: dict[int, dict[int, None]] = {}
    try:
        for _, head, edge in graph.edges(data=True):
            if head != "output":
                entries.setdefault(edge["block"], {})[edge["choice"]] = None
        depths = [graph.nodes[node]["depth"] for node in graph]
    except KeyError as error:
        raise ResnetPathsError("graph", f"{graph} without {error}", allowed, advice) from None
    if sorted(entries) != list(range(max(depths) - 1)):
        raise ResnetPathsError("graph", f"{graph} with edges of blocks {sorted(entries)}", allowed, advice)
    return [list(entries[index]) for index in sorted(entries)]


def _edge_curve(x: int, start: float, end: float, *, joins: bool) -> Curve:
    """From one depth to the next: out of the split in a curve, then straight; into the sum all in one curve."""
    bend = 1.0 if joins else 0.45
    half = 0.5 * bend
    points = [(x, start), (x + half, start), (x + half, end), (x + bend, end), (x + 1, end)]
    return Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO])


def _branch_label(block: int, choice: int, offered: Sequence[Sequence[int]]) -> str:
    several = sum(map(bool, offered[block])) > 1
    return f"$f_{{{block + 1},{int(choice)}}}$" if several else f"$f_{{{block + 1}}}$"


def _draw_box(ax: Axes, at: tuple[float, float], on: bool, *, muted: bool, label: str | None, points: float) -> None:
    edge = "C0" if on else _MUTED if muted else _INK
    face = "C0" if on else "white"
    if label is None:
        ax.plot(*at, marker="s", markersize=points, markeredgewidth=0.5, color=face, markeredgecolor=edge, zorder=3)
        return
    box = {"boxstyle": "round,pad=0.25,rounding_size=0.2", "facecolor": face, "edgecolor": edge, "linewidth": 0.7}
    ink = "white" if on else "0.55" if muted else "black"
    ax.text(*at, label, ha="center", va="center", fontsize=points, color=ink, bbox=box, zorder=3)

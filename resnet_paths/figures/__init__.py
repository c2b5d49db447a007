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

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.path import Path as Curve

from resnet_paths.errors import ResnetPathsError
from resnet_paths.figures.blocks import (
    plot_block_directions,
    plot_block_norms,
    plot_gradient_by_depth,
    plot_scalar_gradients,
    plot_scalings,
)
from resnet_paths.figures.costs import plot_cost_by_depth, plot_training_memory
from resnet_paths.figures.gradients import (
    plot_coherence,
    plot_effective_window,
    plot_path_gradients,
    plot_path_shares,
    plot_windows,
)
from resnet_paths.figures.layout import INK, MARKERS, MUTED, checked, groups_of, legend_above, whole_numbers_from_zero
from resnet_paths.figures.lesions import (
    plot_lesion_counts,
    plot_pair_interactions,
    plot_predicted_effects,
    plot_reorderings,
    plot_single_deletions,
)
from resnet_paths.paper import paper_style, save_figure, weights_hash
from resnet_paths.paths import check_path

__all__ = [
    "paper_style", "plot_block_directions", "plot_block_norms", "plot_coherence", "plot_cost_by_depth",
    "plot_effective_window", "plot_gradient_by_depth", "plot_lesion_counts", "plot_pair_interactions",
    "plot_path_gradients", "plot_path_histogram", "plot_path_shares", "plot_predicted_effects", "plot_reorderings",
    "plot_scalar_gradients", "plot_scalings", "plot_single_deletions", "plot_training_curves", "plot_training_memory",
    "plot_unraveled_graph", "plot_windows", "save_figure", "weights_hash",
]  # fmt: skip

_CURVE_LABELS = {
    "train_loss": "training loss (nats)", "train_error_rate": "training error (%)",
    "test_loss": "test loss (nats)", "test_error_rate": "test error (%)",
}  # fmt: skip


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
    frame = checked("frame", frame, "fraction", [*by, "path_length"], rate=True)
    ax = plt.gca() if ax is None else ax
    groups = groups_of(frame, by, "path_length")
    for index, ((network, rows), marker) in enumerate(zip(groups, cycle(MARKERS), strict=False)):
        x, y, colour = rows["path_length"], 100 * rows["fraction"], f"C{index}"
        if len(groups) == 1:
            ax.bar(x, y, width=0.8, color=colour, label=network)
        else:
            ax.plot(x, y, marker=marker, color=colour, label=network, linewidth=0.7, markersize=2.5)
    ax.set(xlabel="path length (blocks)", ylabel="paths (%)")
    whole_numbers_from_zero(ax)
    if by:
        legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_unraveled_graph(graph: nx.DiGraph, ax: Axes | None = None, highlight: Sequence[int] | None = None) -> Axes:
    """All paths from copies of the input to the sum at the output (Veit et al. 2016, figure 1b).

    A line with a box goes through a branch, labelled as in the paper from f_1 on (block 0 is f_1); a plain line is a
    skip. At each sum the skip comes from above and the branches from below, so that the top path takes no branch and
    the bottom path all of them. Boxes shrink as paths get many and lose their labels where these could not be read:
    beyond 32 paths always.

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
        route = {"input", "output", *(path[i:] for i in range(len(path)))}
    ax = plt.gca() if ax is None else ax
    ax.set_axis_off()
    num_blocks = len(offered)
    # By the last block first: so no two lines cross.
    leaves = sorted(graph.successors("input"), key=lambda leaf: leaf[::-1])
    height = {leaf: -float(index) for index, leaf in enumerate(leaves)}
    for node in nx.topological_sort(graph):
        if node != "input" and node not in height:
            height[node] = float(np.mean([height[tail] for tail in graph.predecessors(node)]))
    height["input"] = height["output"]
    stub = 0.19 * (num_blocks + 1)
    ax.set(xlim=(-1.1 * stub, num_blocks + 1 + 1.1 * stub), ylim=(-len(leaves) + 0.3, 0.7))
    # Labels have a size in points: lay the figure out to know how many a row has.
    ax.figure.canvas.figure.draw_without_rendering()
    row_points = ax.bbox.height / ax.figure.dpi * 72 / len(leaves)
    most_branches = max((sum(map(bool, entries)) for entries in offered), default=0)
    font_points = min(mpl.rcParams["font.size"], row_points * (0.8 if most_branches < 2 else 0.6))
    thin = min(max(0.15 * row_points, 0.3), 0.8)
    labelled = len(leaves) <= 32 and font_points >= 4

    layers: dict[bool, list[Curve]] = {False: [], True: []}
    for tail, head, edge in graph.edges(data=True):
        x, on = graph.nodes[tail]["depth"], tail in route and head in route
        layers[on].append(_edge_curve(x, height[tail], height[head], fans_out=tail == "input"))
        if edge["choice"]:
            _draw_box(
                ax, (x + 0.36, height[tail]), on, muted=bool(route),
                label=_branch_label(edge["block"], edge["choice"], offered) if labelled else None,
                points=font_points if labelled else 4.0 if on else min(0.8 * row_points, 4.0),
            )  # fmt: skip
    middle = height["input"]
    joined = num_blocks + 1
    layers[bool(route)] += [Curve([(x, middle), (x + stub, middle)]) for x in (-stub, joined)]
    for on, curves in layers.items():
        colour = "C0" if on else MUTED if route else INK
        lines = PathCollection(
            curves, facecolors="none", edgecolors=colour, linewidths=1.8 if on else thin,
            zorder=2 if on else 1, transform=ax.transData,
        )  # fmt: skip
        lines.set_gid("highlighted-route" if on else "routes")
        ax.add_collection(lines, autolim=False)
    ax.plot([0], [middle], marker="o", color="C0" if route else INK, markersize=3, zorder=4)
    for node in graph:
        if graph.in_degree(node) > 1:
            at = (graph.nodes[node]["depth"], height[node])
            _draw_sum(ax, at, node in route, bool(route), min(0.8 * row_points, 8.0))
    for x, name in ((-0.55 * stub, "input"), (joined + 0.6 * stub, "output")):
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
    frame = checked("frame", frame, value, ["network", "seed", "epoch"], rate=rate)
    ax = plt.gca() if ax is None else ax
    colours = [f"C{index}" for index in range(frame["network"].nunique())]
    frame = frame.assign(**{value: frame[value] * (100 if rate else 1)})
    sns.lineplot(
        frame, x="epoch", y=value, hue="network", style="network", palette=colours, errorbar=("pi", 100), ax=ax
    )
    ax.set(xlabel="epoch", ylabel=_CURVE_LABELS[value])
    whole_numbers_from_zero(ax)
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def _offered(graph: nx.DiGraph) -> list[list[int]]:
    """The entries that each block offers, read off the edges; refuses what is not an unraveled graph."""
    allowed, advice = "a graph from resnet_paths.unraveled_graph", "Call unraveled_graph(3), for example."
    if not isinstance(graph, nx.DiGraph) or not {"input", "output"} <= set(graph):
        raise ResnetPathsError("graph", str(graph), allowed, advice)
    entries: dict[int, dict[int, None]] = {}
    try:
        for _, _, edge in graph.edges(data=True):
            if edge["block"] is not None:
                entries.setdefault(edge["block"], {})[edge["choice"]] = None
        depths = [graph.nodes[node]["depth"] for node in graph]
    except KeyError as error:
        raise ResnetPathsError("graph", f"{graph} without {error}", allowed, advice) from None
    if sorted(entries) != list(range(max(depths) - 1)):
        raise ResnetPathsError("graph", f"{graph} with edges of blocks {sorted(entries)}", allowed, advice)
    return [list(entries[index]) for index in sorted(entries)]


def _edge_curve(x: int, start: float, end: float, *, fans_out: bool) -> Curve:
    """From one depth to the next: straight, then in a curve into the sum; out of the input all in one curve."""
    bend = 1.0 if fans_out else 0.36
    turn = x + 1 - bend
    points = [(x, start), (turn, start), (x + 1 - bend / 2, start), (x + 1 - bend / 2, end), (x + 1, end)]
    return Curve(points, [Curve.MOVETO, Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])


def _branch_label(block: int, choice: int, offered: Sequence[Sequence[int]]) -> str:
    several = sum(map(bool, offered[block])) > 1
    return f"$f_{{{block + 1},{int(choice)}}}$" if several else f"$f_{{{block + 1}}}$"


def _draw_box(ax: Axes, at: tuple[float, float], on: bool, *, muted: bool, label: str | None, points: float) -> None:
    edge = "C0" if on else MUTED if muted else INK
    face = "C0" if on else "white"
    if label is None:
        ax.plot(*at, marker="s", markersize=points, markeredgewidth=0.5, color=face, markeredgecolor=edge, zorder=3)
        return
    box = {"boxstyle": "round,pad=0.25,rounding_size=0.2", "facecolor": face, "edgecolor": edge, "linewidth": 0.7}
    ink = "white" if on else "0.55" if muted else "black"
    ax.text(*at, label, ha="center", va="center", fontsize=points, color=ink, bbox=box, zorder=3)


def _draw_sum(ax: Axes, at: tuple[float, float], on: bool, muted: bool, points: float) -> None:
    colour = "C0" if on else MUTED if muted else INK
    line = min(0.11 * points, 1.0)
    ax.plot(*at, marker="o", markersize=points, color="white", markeredgecolor=colour, markeredgewidth=line, zorder=4)
    ax.plot(*at, marker="+", markersize=0.6 * points, color=colour, markeredgewidth=line, zorder=5)

"""Drawing of the unraveled view, with one route per path (Veit et al. 2016, figure 1b)."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.path import Path as Curve

from resnet_paths._utils.arguments import require_list
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.paths import Entry
from resnet_paths.figures.layout import INK, MUTED, axes_of, draw_sum

__all__ = ["plot_unraveled_graph"]


def plot_unraveled_graph(graph: nx.DiGraph, ax: Axes | None = None, highlight: Sequence[Entry] | None = None) -> Axes:
    """Draw all paths from the input to the sum at the output (Veit et al. 2016, figure 1b).

    A line with a box is a branch, labelled as in the paper from f_1 on (block 0 is f_1); a line without a box is a
    skip. At each sum the skip comes from above and the branches from below, so that the top path takes no branch and
    the bottom path takes all branches. Branches of one block are numbered, and so are the paths through a chain inside
    a branch. Boxes shrink with the number of paths, and have no labels if these are not readable, in particular for
    more than 32 paths.

    Args:
        graph: From `resnet_paths.unraveled_graph`.
        ax: The axes to draw into; the current axes if None.
        highlight: One path, one entry per block, to draw in a strong colour; everything else is muted.

    Returns:
        The axes, with their frame turned off.

    Raises:
        ResnetPathsError: If `graph` is another graph, or `highlight` is not one of its paths.
    """
    offered = _offered(graph)
    route: set[object] = set()
    if highlight is not None:
        path = _check_entries(offered, highlight)
        route = {"input", "output", *(path[i:] for i in range(len(path)))}
    ax = axes_of(ax)
    ax.set_axis_off()
    num_blocks = len(offered)
    height, num_leaves = _heights(graph, offered)
    stub = 0.19 * (num_blocks + 1)
    ax.set(xlim=(-1.1 * stub, num_blocks + 1 + 1.1 * stub), ylim=(-num_leaves + 0.3, 0.7))
    # Labels have a size in points: run the layout to measure the points per row.
    ax.figure.canvas.figure.draw_without_rendering()
    row_points = ax.bbox.height / ax.figure.dpi * 72 / num_leaves
    most_branches = max((sum(map(bool, entries)) for entries in offered), default=0)
    font_points = min(mpl.rcParams["font.size"], row_points * (0.8 if most_branches < 2 else 0.6))
    thin = min(max(0.15 * row_points, 0.3), 0.8)
    labelled = num_leaves <= 32 and font_points >= 4

    layers: dict[bool, list[Curve]] = {False: [], True: []}
    for tail, head, edge in graph.edges(data=True):
        x, on = graph.nodes[tail]["depth"], tail in route and head in route
        layers[on].append(_edge_curve(x, height[tail], height[head], fans_out=tail == "input"))
        if edge["choice"]:
            _draw_box(
                ax,
                (x + 0.36, height[tail]),
                on,
                muted=bool(route),
                label=_branch_label(edge["block"], edge["choice"], offered) if labelled else None,
                points=font_points if labelled else 4.0 if on else min(0.8 * row_points, 4.0),
            )
    middle = height["input"]
    joined = num_blocks + 1
    layers[bool(route)] += [Curve([(x, middle), (x + stub, middle)]) for x in (-stub, joined)]
    for on, curves in layers.items():
        colour = "C0" if on else MUTED if route else INK
        lines = PathCollection(
            curves,
            facecolors="none",
            edgecolors=colour,
            linewidths=1.8 if on else thin,
            zorder=2 if on else 1,
            transform=ax.transData,
        )
        lines.set_gid("highlighted-route" if on else "routes")
        ax.add_collection(lines, autolim=False)
    ax.plot([0], [middle], marker="o", color="C0" if route else INK, markersize=3, zorder=4)
    for node in graph:
        if graph.in_degree(node) > 1:
            at = (graph.nodes[node]["depth"], height[node])
            draw_sum(ax, at, node in route, bool(route), min(0.8 * row_points, 8.0))
    for x, name in ((-0.55 * stub, "input"), (joined + 0.6 * stub, "output")):
        ax.annotate(name, (x, middle), (0, 5), textcoords="offset points", ha="center", va="bottom", fontsize="small")
    return ax


def _heights(graph: nx.DiGraph, offered: Sequence[Sequence[Entry]]) -> tuple[dict[object, float], int]:
    """Vertical position of every node, and the number of rows."""
    # Sorted by the last block first, so that no two lines cross.
    ranks = [{entry: rank for rank, entry in enumerate(entries)} for entries in offered]
    leaves = sorted(graph.successors("input"), key=lambda leaf: [r[e] for r, e in zip(ranks, leaf, strict=False)][::-1])
    height: dict[object, float] = {leaf: -float(index) for index, leaf in enumerate(leaves)}
    for node in nx.topological_sort(graph):
        if node != "input" and node not in height:
            height[node] = float(np.mean([height[tail] for tail in graph.predecessors(node)]))
    height["input"] = height["output"]
    return height, len(leaves)


def _offered(graph: nx.DiGraph) -> list[list[Entry]]:
    """The choices of each block, from the edges of the graph; raises for other graphs."""
    allowed, advice = "a graph from resnet_paths.unraveled_graph", "Call unraveled_graph(3), for example."
    if not isinstance(graph, nx.DiGraph) or not {"input", "output"} <= set(graph):
        raise ResnetPathsError("graph", str(graph), allowed, advice)
    entries: dict[int, dict[Entry, None]] = {}
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


def _check_entries(offered: Sequence[Sequence[Entry]], path: Sequence[Entry]) -> tuple[Entry, ...]:
    """Validate a path."""
    path = require_list("path", path, f"{len(offered)} entries, one per block")
    if len(path) != len(offered):
        raise ResnetPathsError("path", tuple(path), f"{len(offered)} entries, one per block")
    for index, (entry, entries) in enumerate(zip(path, offered, strict=True)):
        if entry not in entries:
            raise ResnetPathsError(
                f"path[{index}]", entry, f"one of {tuple(entries)}", "False takes the skip, True the branch."
            )
    return tuple(path)


def _edge_curve(x: int, start: float, end: float, *, fans_out: bool) -> Curve:
    """Curve from one depth to the next: a straight line and a curve into the sum; from the input a curve only."""
    bend = 1.0 if fans_out else 0.36
    turn = x + 1 - bend
    points = [(x, start), (turn, start), (x + 1 - bend / 2, start), (x + 1 - bend / 2, end), (x + 1, end)]
    return Curve(points, [Curve.MOVETO, Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])


def _branch_label(block: int, choice: Entry, offered: Sequence[Sequence[Entry]]) -> str:
    """Label of a branch, numbered if the block has several branches or paths."""
    taken = [entry for entry in offered[block] if entry]
    return f"$f_{{{block + 1},{taken.index(choice) + 1}}}$" if len(taken) > 1 else f"$f_{{{block + 1}}}$"


def _draw_box(ax: Axes, at: tuple[float, float], on: bool, *, muted: bool, label: str | None, points: float) -> None:
    edge = "C0" if on else MUTED if muted else INK
    face = "C0" if on else "white"
    if label is None:
        ax.plot(*at, marker="s", markersize=points, markeredgewidth=0.5, color=face, markeredgecolor=edge, zorder=3)
        return
    box = {"boxstyle": "round,pad=0.25,rounding_size=0.2", "facecolor": face, "edgecolor": edge, "linewidth": 0.7}
    ink = "white" if on else "0.55" if muted else "black"
    ax.text(*at, label, ha="center", va="center", fontsize=points, color=ink, bbox=box, zorder=3)

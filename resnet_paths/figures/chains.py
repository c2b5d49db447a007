"""Drawing of a whole network: trunk, branches and skips, with repeated blocks folded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.path import Path as Curve

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.paths import Choice, Entry, check_path
from resnet_paths.figures.layout import INK, MUTED, axes_of, draw_sum, legend_above

__all__ = ["plot_chain"]

_COLUMNS = ("index", "block", "depth", "skip", "before", "branch", "after", "num_branches", "shape")
# In units of the width and of the height of a block.
_SEGMENT = 0.24  # of trunk, for the tick of operations before or after a block
_LEVEL, _ROW, _BOX = 1.55, 0.75, 0.5  # distance of an inner trunk, of two branches, and height of a box
_ARC, _NAME = 0.62, 0.5  # depth of skips below the trunk, and height of names
_MIN_WIDTH = 3.5  # blocks of a shorter network are not larger
_DELETED = "C3"


def plot_chain(frame: pd.DataFrame, ax: Axes | None = None, highlight: Sequence[Entry] | None = None) -> Axes:
    """Draw a whole network: the trunk in one row, branches above it, skips as arcs below, equal blocks folded into one.

    Boxes contain the position of the block, counted from 0, or the first and last position of folded blocks, with their
    number above; a number after a colon is that of one of several branches. The last part of a name is shown if there
    is room. A chain inside a branch is drawn one row higher. Ticks on the trunk show operations before the block
    splits into skip and branch, and after they are added. The shapes of the states, without the batch dimension, are
    shown below. A deleted branch is crossed out.

    Args:
        frame: From `resnet_paths.core.chain.ResidualChain.to_frame`, also of a chain with deleted blocks.
        ax: The axes to draw into; the current axes if None.
        highlight: One path, one entry per block, to draw in a strong colour; everything else is muted.

    Returns:
        The axes, with their frame turned off.

    Raises:
        ResnetPathsError: If `frame` is another frame, or `highlight` is not one of its paths.
    """
    blocks = _blocks_of(frame)
    if highlight is not None:
        _set_entries(blocks, check_path([block.choices for block in blocks], highlight))
    ax = axes_of(ax)
    ax.set_axis_off()
    folded = _fold(blocks)
    width, height = sum(run.width for run in folded), max(run.height for run in folded)
    stub = max(0.11 * width + 0.3, (_MIN_WIDTH - width) / 2)
    ax.set(xlim=(-1.05 * stub, width + 1.05 * stub), ylim=(-1.2, height + 0.3))
    legend = _legend_of_chain(blocks)
    if legend:
        legend_above(ax, legend)
    ax.figure.canvas.figure.draw_without_rendering()  # text sizes are in points: measure the points per data unit
    points = ax.bbox.width / ax.figure.dpi * 72 / (width + 2.1 * stub)
    pen = _Pen(ax, points, ax.bbox.height / ax.figure.dpi * 72 / (height + 1.5), muted=highlight is not None)
    end = pen.chain(folded, 0.0, 0.0)
    on = highlight is not None
    pen.line("trunk", [(-stub, 0), (0, 0)], on)
    pen.line("trunk", [(end, 0), (end + stub, 0)], on)
    pen.shapes(folded)
    pen.finish()
    for x, name in ((-0.55 * stub, "input"), (end + 0.55 * stub, "output")):
        size = min(mpl.rcParams["font.size"] - 1, 0.95 * stub * points / (0.6 * len(name)))
        ax.annotate(name, (x, 0), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=size)
    return ax


@dataclass
class _Drawn:
    """A block to draw."""

    row: dict[str, Any]
    inner: list[_Drawn]
    entry: Entry | None = None  # choice of the highlighted path; None if it does not pass here

    @property
    def choices(self) -> tuple[Choice, ...]:
        skips: tuple[Choice, ...] = (False,) if self.row["skip"] != "none" else ()
        if self.inner:
            return (*skips, tuple(block.choices for block in self.inner))
        return (*skips, *(True if i == 1 else i for i in range(1, self.row["num_branches"] + 1)))

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for blocks with equal drawings."""
        said = (self.row[column] for column in ("skip", "before", "branch", "after", "num_branches"))
        return (*said, self.entry if not self.inner else bool(self.entry), *(block.key for block in self.inner))

    @property
    def may_repeat(self) -> bool:
        """Whether the block can be folded: not at a stage start, unless it is a dense layer, which widens the state."""
        return "->" not in self.row["shape"] or (self.row["skip"] == "concat" and not self.row["before"])


@dataclass
class _Run:
    """Repeated blocks, or groups of blocks, that are drawn once."""

    blocks: list[_Drawn]  # of the first group
    times: int
    last: list[_Drawn]  # of the last group

    def __post_init__(self) -> None:
        self.inner = [_fold(block.inner) for block in self.blocks]
        self.widths = [_width(block, inner) for block, inner in zip(self.blocks, self.inner, strict=True)]
        self.width = sum(self.widths)
        self.height = max(_height(block, inner) for block, inner in zip(self.blocks, self.inner, strict=True))
        self.height += 0.55 * (self.times > 1)


def _width(block: _Drawn, inner: list[_Run]) -> float:
    segments = _SEGMENT * (bool(block.row["before"]) + bool(block.row["after"]))
    return segments + (sum(run.width for run in inner) + 0.7 if inner else 1.0)


def _height(block: _Drawn, inner: list[_Run]) -> float:
    if inner:
        return _LEVEL + max(run.height for run in inner)
    rows = max(int(block.row["num_branches"]), 1)
    return 1 + _BOX / 2 + _ROW * (rows - 1) + _NAME


def _blocks_of(frame: pd.DataFrame) -> list[_Drawn]:
    """The blocks of a frame as a tree, with those inside branches as children; raises for other frames."""
    if not isinstance(frame, pd.DataFrame) or not set(_COLUMNS) <= set(frame) or frame.empty:
        given = f"columns {', '.join(map(str, frame))}" if isinstance(frame, pd.DataFrame) else type(frame).__name__
        raise ResnetPathsError(
            "frame", given, "the frame of a chain of at least one block", "Call plot_chain(chain.to_frame())."
        )
    levels: list[list[_Drawn]] = [[]]
    for row in frame.to_dict("records"):
        del levels[row["depth"] + 1 :]
        block = _Drawn({str(name): value for name, value in row.items()}, [])
        levels[-1].append(block)
        levels.append(block.inner)
    return levels[0]


def _set_entries(blocks: Sequence[_Drawn], path: Sequence[Entry]) -> None:
    for block, entry in zip(blocks, path, strict=True):
        block.entry = int(entry) if not isinstance(entry, tuple) else 1
        if isinstance(entry, tuple):
            _set_entries(block.inner, entry)


def _fold(blocks: Sequence[_Drawn]) -> list[_Run]:
    """Fold repeated blocks, and repeated groups of blocks such as attention and MLP."""
    keys = [block.key if block.may_repeat else (*block.key, i) for i, block in enumerate(blocks)]
    folded, start = [], 0
    while start < len(keys):
        found = ((size, _times(keys, start, size)) for size in range(1, (len(keys) - start) // 2 + 1))
        size, times = next(((size, times) for size, times in found if times > 1), (1, 1))
        stop = start + size * times
        folded.append(_Run(list(blocks[start : start + size]), times, list(blocks[stop - size : stop])))
        start = stop
    return folded


def _times(keys: Sequence[object], start: int, size: int) -> int:
    """Number of repetitions of the group at `start`; 1 if it contains equal neighbours, which are folded themselves."""
    group = list(keys[start : start + size])
    if any(one == other for one, other in itertools.pairwise(group)):
        return 1
    times = 1
    while list(keys[start + times * size : start + (times + 1) * size]) == group:
        times += 1
    return times


class _Pen:
    """Draws the parts of a chain; lines are collected and drawn by kind at the end."""

    def __init__(self, ax: Axes, x_points: float, y_points: float, *, muted: bool) -> None:
        self.ax = ax
        self.x_points, self.y_points, self.muted = x_points, y_points, muted
        self.line_width = min(max(0.05 * x_points, 0.5), 0.9)
        self.mark_points = min(max(0.22 * x_points, 2.5), 7.0)
        self.lines: dict[tuple[str, bool], list[Curve]] = {}

    def chain(self, folded: Sequence[_Run], x: float, base: float, on: bool = True) -> float:
        """Draw runs from `x` on, with the trunk at height `base`; returns the x coordinate of their end."""
        for run in folded:
            start = x
            for block, last, inner, width in zip(run.blocks, run.last, run.inner, run.widths, strict=True):
                self.block(block, last, inner, x, x + width, base, repeated=run.times > 1, on=on)
                x += width
            if run.times > 1:
                self.bracket(start + 0.2, x - 0.2, base + run.height - 0.55, f"× {run.times}")
        return x

    def block(
        self,
        block: _Drawn,
        last: _Drawn,
        inner: Sequence[_Run],
        x: float,
        end: float,
        base: float,
        *,
        repeated: bool,
        on: bool,
    ) -> None:
        """Draw one block, or the first block of a run, between two points of the trunk."""
        entry = block.entry if on else None
        if block.row["before"]:
            x = self.segment(x, x + _SEGMENT, base, passed=entry is not None)
        if block.row["after"]:
            end = self.segment(end, end - _SEGMENT, base, passed=entry is not None)
        if block.row["skip"] != "none":
            self.skip(block.row["skip"], x, end, base, on=entry == 0)
        rows = max(int(block.row["num_branches"]), 1)
        deleted = block.row["num_branches"] == 0
        for number in range(1, rows + 1):
            taken = entry == number
            height = base + (_LEVEL if inner else 1 + _ROW * (number - 1))
            left, right = (x + 0.35, end - 0.35) if inner else (x + 0.16, end - 0.16)
            if not deleted:
                self.line("branch", _rising(x, left, base, height), taken)
                self.line("branch", _rising(end, right, base, height), taken)
            if inner:
                self.chain(inner, left, height, on=taken or not self.muted)
                continue
            suffix = f":{number}" if rows > 1 else ""
            labels = [f"{block.row['index']}{suffix}"]
            if repeated:
                labels.insert(0, f"{block.row['index']}…{last.row['index']}{suffix}")
            self.box((left, right), height, labels, taken, deleted=deleted, repeated=repeated)
        if not inner:
            self.name(block, last, (x + end) / 2, base + 1 + _ROW * (rows - 1) + _BOX / 2, end - x, repeated=repeated)
        if (block.row["skip"] != "none" and not deleted) or rows > 1:
            self.sum((end, base), block.row["skip"] == "concat", passed=entry is not None)

    def skip(self, kind: str, x: float, end: float, base: float, *, on: bool) -> None:
        """Draw an arc; a projection has an open square on it."""
        bend = min(0.5, 0.35 * (end - x))
        self.line("skip", [(x, base), (x + 0.3 * bend, base - _ARC), (end - 0.3 * bend, base - _ARC), (end, base)], on)
        if kind == "projection":
            self.ax.plot(
                (x + end) / 2,
                base - 0.75 * _ARC,
                marker="s",
                markersize=0.7 * self.mark_points,
                color="white",
                markeredgecolor=self.colour(on),
                markeredgewidth=self.line_width,
                zorder=4,
                gid="projection",
            )

    def box(
        self,
        sides: tuple[float, float],
        middle: float,
        labels: Sequence[str],
        on: bool,
        *,
        deleted: bool,
        repeated: bool,
    ) -> None:
        """Draw a branch with the first label that fits; folded blocks have copies in the background."""
        (left, right), edge = sides, _DELETED if deleted else self.colour(on)
        aside, up = 1.6 / self.x_points, 1.6 / self.y_points
        for copy in (2, 1, 0) if repeated else (0,):
            self.ax.add_patch(
                Rectangle(
                    (left + copy * aside, middle - _BOX / 2 + copy * up),
                    right - left,
                    _BOX,
                    facecolor="C0" if on else "white",
                    edgecolor="white" if on and copy == 0 and repeated else edge,
                    linewidth=self.line_width,
                    linestyle="--" if deleted else "-",
                    zorder=3,
                    gid="deleted-branch" if deleted else "copy" if copy else "branch-box",
                )
            )
        if deleted:
            for one, other in ((-1, 1), (1, -1)):
                ends = [middle + one * _BOX / 2, middle + other * _BOX / 2]
                self.ax.plot([left, right], ends, color=edge, linewidth=self.line_width, zorder=3.5, scalex=False)
            return
        for label in labels:
            points = min(mpl.rcParams["font.size"], (right - left) * self.x_points / (0.65 * len(label) + 0.8))
            points = min(points, 0.8 * _BOX * self.y_points)
            if points >= 4:
                ink = "white" if on else "0.55" if self.muted else "black"
                at = ((left + right) / 2, middle)
                self.ax.text(
                    *at, label, ha="center", va="center_baseline", fontsize=points, color=ink, zorder=4, gid="label"
                )
                return

    def name(self, block: _Drawn, last: _Drawn, x: float, y: float, room: float, *, repeated: bool) -> None:
        """Draw the last part of a block's name, or the common part of a run, if it fits."""
        name = _short_name(block.row["block"], last.row["block"])
        gap = 1.5 + 3.2 * repeated  # points: above the copies
        wide, high = 0.95 * room * self.x_points / (0.6 * len(name) or 1), (_NAME * self.y_points - gap) / 1.2
        points = min(mpl.rcParams["font.size"] - 2, wide, high)
        if points >= 4 and name:
            colour = "0.55" if self.muted and block.entry is None else "0.3"
            y += gap / self.y_points
            self.ax.text(x, y, name, ha="center", va="bottom", fontsize=points, color=colour, gid="name")

    def bracket(self, left: float, right: float, y: float, text: str) -> None:
        """Draw a bracket above repeated blocks, with the number of repetitions."""
        foot = y + 0.1
        self.line("bracket", [(left, y), (left, foot), (right, foot), (right, y)], on=False, curved=False)
        points = max(min(mpl.rcParams["font.size"] - 1, 0.35 * self.y_points), 4)
        self.ax.text((left + right) / 2, foot + 0.04, text, ha="center", va="bottom", fontsize=points, gid="times")

    def sum(self, at: tuple[float, float], concatenates: bool, *, passed: bool) -> None:
        """Where skip and branches meet: a plus, or a bar where they are concatenated."""
        draw_sum(self.ax, at, passed, self.muted, self.mark_points, sign="|" if concatenates else "+")

    def segment(self, x: float, to: float, base: float, *, passed: bool) -> float:
        """A piece of trunk with a tick, for what is done there; returns where it ends."""
        middle, half = (x + to) / 2, 2.5 / self.y_points
        self.line("trunk", [(x, base), (to, base)], passed)
        self.line("tick", [(middle, base - half), (middle, base + half)], passed)
        return to

    def shapes(self, folded: Sequence[_Run]) -> None:
        """Draw the shape of the states below each part of the trunk with one shape."""
        shapes = [run.last[-1].row["shape"].split(" -> ")[-1] for run in folded]
        ends = [0.0, *itertools.accumulate(run.width for run in folded)]
        groups = [list(group) for _, group in itertools.groupby(range(len(folded)), key=shapes.__getitem__)]
        spans = [(ends[group[0]], ends[group[-1] + 1], shapes[group[0]]) for group in groups]
        room = min((0.92 * (right - left) * self.x_points / (0.6 * len(text)) for left, right, text in spans))
        points = min(mpl.rcParams["font.size"] - 2, room, 0.3 * self.y_points)
        if points < 4:
            return
        for left, right, text in spans:
            self.ax.plot([left + 0.08, right - 0.08], [-0.78, -0.78], color=MUTED, linewidth=0.6, gid="shape")
            self.ax.text(
                (left + right) / 2, -0.84, text, ha="center", va="top", fontsize=points, color="0.3", gid="shape"
            )

    def line(self, kind: str, points: Iterable[tuple[float, float]], on: bool, *, curved: bool = True) -> None:
        points = list(points)
        codes = [Curve.MOVETO] + [Curve.CURVE4 if len(points) == 4 and curved else Curve.LINETO] * (len(points) - 1)
        self.lines.setdefault((kind, on and self.muted), []).append(Curve(points, codes))

    def colour(self, on: bool) -> str:
        return "C0" if on and self.muted else MUTED if self.muted else INK

    def finish(self) -> None:
        """Draw the lines."""
        for (kind, on), curves in self.lines.items():
            lines = PathCollection(
                curves,
                facecolors="none",
                edgecolors="0.55" if kind == "bracket" else self.colour(on),
                linewidths=1.8 if on else 0.6 if kind == "bracket" else self.line_width,
                zorder=2 if on else 1,
                transform=self.ax.transData,
            )
            lines.set_gid(f"highlighted-{kind}" if on else kind)
            self.ax.add_collection(lines, autolim=False)


def _rising(x: float, side: float, base: float, height: float) -> list[tuple[float, float]]:
    """From the trunk to the side of a box."""
    return [(x, base), (x, base + 0.7 * (height - base)), (x + 0.4 * (side - x), height), (side, height)]


def _short_name(first: str, last: str) -> str:
    """The last part of the name of a block, or the last common part of the names of a run."""
    parts = first.split(".")
    if parts[-1] != last.split(".")[-1]:
        both = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(parts, last.split("."), strict=False))
        return ([part for part, _ in both] or [""])[-1]
    return parts[-1] if not parts[-1].isdigit() else ".".join(parts[-2:])


def _legend_of_chain(blocks: Sequence[_Drawn]) -> list[Line2D]:
    """Legend handles of the symbols that occur."""

    def rows(blocks: Sequence[_Drawn]) -> Iterable[dict[str, Any]]:
        for block in blocks:
            yield block.row
            yield from rows(block.inner)

    found = list(rows(blocks))
    mark: dict[str, Any] = {"color": INK, "markerfacecolor": "white", "markersize": 4, "linewidth": 0.8}
    handles = []
    if any(row["skip"] == "projection" for row in found):
        handles.append(Line2D([], [], marker="s", label="projection", **mark))
    if any(row["skip"] == "concat" for row in found):
        bar = Curve.make_compound_path(Curve.unit_circle(), Curve([(0, -0.6), (0, 0.6)]))
        handles.append(Line2D([], [], marker=bar, label="concatenation", **mark | {"linewidth": 0, "markersize": 6}))
    if any(row["num_branches"] == 0 for row in found):
        deleted: dict[str, Any] = {"color": _DELETED, "linestyle": "--", "linewidth": 0.8}
        handles.append(Line2D([], [], marker="x", markersize=4, label="deleted branch", **deleted))
    return handles

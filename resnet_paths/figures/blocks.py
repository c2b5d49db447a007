"""Figures along the blocks of a network: norms and gradient of each block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from resnet_paths._utils.arguments import require_int, require_list
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures.layout import MARKERS, MUTED, axes_of, checked, groups_of, legend_above, mark_stages

__all__ = [
    "plot_block_directions",
    "plot_block_norms",
    "plot_gradient_by_depth",
    "plot_scalar_gradients",
]

_NORMS = {"skip_norm": "x, along the skip", "branch_norm": "F(x)", "sum_norm": "F(x) + x"}
_DIRECTIONS = {"cosine": "cosine of x and F(x)", "kept_signal_share": "share of the signal kept by the skips"}


def plot_block_norms(frame: pd.DataFrame, ax: Axes | None = None, highlight: int | None = None) -> Axes:
    """Norms of x, F(x) and their sum in every block, on a logarithmic axis.

    One line per norm, with bars of one standard error. Marks on top show where a new stage starts.

    Args:
        frame: From `resnet_paths.block_norms`.
        ax: The axes to draw into; the current axes if None.
        highlight: Position of a block to highlight by a grey band.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, or a block occurs twice.
    """
    return _plot_along_blocks(frame, _NORMS, ax, highlight, "norm of the state of an example", log=True)


def plot_block_directions(frame: pd.DataFrame, ax: Axes | None = None, highlight: int | None = None) -> Axes:
    """Cosine of x and F(x) in every block, and the share of the signal that the skips alone carry.

    Args:
        frame: From `resnet_paths.block_norms`.
        ax: The axes to draw into; the current axes if None.
        highlight: Position of a block to highlight by a grey band.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, or a block occurs twice.
    """
    ax = _plot_along_blocks(frame, _DIRECTIONS, ax, highlight, "cosine, share", log=False)
    ax.axhline(0, color=MUTED, linewidth=0.7, zorder=0)
    return ax


def plot_gradient_by_depth(frame: pd.DataFrame, ax: Axes | None = None, networks: Sequence[str] | None = None) -> Axes:
    """Norm of the gradient at each depth, on a logarithmic axis: one line per network.

    Args:
        frame: From `resnet_paths.gradient_by_depth`: ``depth``, ``gradient_norm``, ``gradient_norm_se``; an
            optional column ``network`` separates several networks and names them in the legend.
        ax: The axes to draw into; the current axes if None.
        networks: Names of networks in the order of their colours, for equal colours in several figures; by default
            those of the frame.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, a depth occurs twice in one network, or a network is not among
            `networks`.
    """
    by = ["network"] if isinstance(frame, pd.DataFrame) and "network" in frame else []
    frame = checked("frame", frame, "gradient_norm", [*by, "depth"], ["gradient_norm_se"])
    ax = axes_of(ax)
    groups = groups_of(frame, by, "depth")
    order = [name for name, _ in groups] if networks is None else require_list("networks", networks, "a list of names")
    for network, rows in groups:
        if network not in order:
            raise ResnetPathsError("networks", order, f"names that include {network!r}")
        index = order.index(network)
        ax.errorbar(
            rows["depth"],
            rows["gradient_norm"],
            yerr=rows["gradient_norm_se"],
            label=network,
            color=f"C{index}",
            marker=MARKERS[index % len(MARKERS)],
            markersize=2.5,
            linewidth=0.8,
            elinewidth=0.5,
        )
    ax.set(yscale="log", xlabel="depth (preceding blocks)", ylabel="gradient norm")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if by:
        legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_scalar_gradients(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The products of F' and of 1 + F' against the depth, on a logarithmic axis.

    Absolute values are drawn; gradients of exactly 0 are omitted.

    Args:
        frame: From `resnet_paths.gradients.scalar_gradients`.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, or a depth occurs twice in one network.
    """
    frame = checked("frame", frame, "gradient", ["network", "depth"])
    ax = axes_of(ax)
    labels = {"plain": "product of F', plain", "residual": "product of 1 + F', residual"}
    for (network, rows), marker in zip(groups_of(frame, ["network"], "depth"), cycle(MARKERS), strict=False):
        size = rows["gradient"].abs()
        ax.plot(
            rows["depth"],
            size.where(size > 0),
            marker=marker,
            markersize=2.5,
            linewidth=0.8,
            label=labels.get(str(network), str(network)),
        )
    ax.axhline(1, color=MUTED, linewidth=0.7, zorder=0)
    ax.set(yscale="log", xlabel="depth (layers)", ylabel="|d state / d input|")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def _plot_along_blocks(
    frame: pd.DataFrame, names: dict[str, str], ax: Axes | None, highlight: int | None, ylabel: str, *, log: bool
) -> Axes:
    columns = [column for name in names for column in (name, f"{name}_se")]
    always = list(names)[-1]  # the others are NaN in a plain net
    frame = checked("frame", frame, always, ["block_index"], [*columns, "stage"]).sort_values("block_index")
    ax = axes_of(ax)
    x = frame["block_index"]
    if highlight is not None:
        highlight = require_int("highlight", highlight, 0, int(x.max()), noun="the position of a block")
    for (name, label), marker in zip(names.items(), cycle(MARKERS), strict=False):
        ax.errorbar(
            x,
            frame[name],
            yerr=frame[f"{name}_se"],
            label=label,
            marker=marker,
            markersize=2.5,
            linewidth=0.8,
            elinewidth=0.5,
        )
    if highlight is not None:
        ax.axvspan(highlight - 0.5, highlight + 0.5, color="0.9", zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set(xlabel="block (index from 0)", ylabel=ylabel, xlim=(x.min() - 0.8, x.max() + 0.8))
    if log:
        ax.set_yscale("log")
    starts = x[frame["stage"].diff() > 0].tolist()
    if starts:
        mark_stages(ax, starts)
    legend_above(ax, ax.get_legend_handles_labels()[0], gap_points=11 if starts else 3)
    return ax

"""Figures of the costs of networks and kinds of skip connections: parameters, memory, gradient."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter

from resnet_paths._utils.arguments import require_choice
from resnet_paths.figures.layout import MARKERS, axes_of, checked, groups_of, legend_above

__all__ = ["plot_cost_by_depth", "plot_training_memory"]

_COSTS = {
    "num_parameters": "parameters",
    "peak_megabytes": "peak memory (MB)",
    "gradient_gain": "gradient at the input / at the output",
}
# Different lightness, so that the parts can be distinguished in grey.
_PARTS = {
    "parameters_megabytes": ("parameters", "0.2"),
    "saved_megabytes": ("saved for the backward pass", "C0"),
    "rest_megabytes": ("rest of the peak", "0.8"),
}


def plot_training_memory(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Peak memory of a training step: one bar per network, labelled with the peak in megabytes.

    Args:
        frame: One row per network: ``network``, and in megabytes (10^6 bytes) ``parameters_megabytes``,
            ``saved_megabytes`` and ``peak_megabytes``, see `resnet_paths.core.costs.training_memory`.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes; the first row is on top.

    Raises:
        ResnetPathsError: If columns are missing, or a network occurs twice.
    """
    frame = checked("frame", frame, "peak_megabytes", ["network"], ["parameters_megabytes", "saved_megabytes"])
    ax = axes_of(ax)
    rest = frame["peak_megabytes"] - frame["parameters_megabytes"] - frame["saved_megabytes"]
    frame = frame.assign(rest_megabytes=rest.clip(lower=0))
    left = np.zeros(len(frame))
    for column, (label, colour) in _PARTS.items():
        ax.barh(frame["network"], frame[column], left=left, color=colour, label=label, height=0.7)
        left += frame[column].to_numpy()
    for place, (end, peak) in enumerate(zip(left, frame["peak_megabytes"], strict=True)):
        ax.annotate(f"{peak:.0f}", (end, place), (2, 0), textcoords="offset points", va="center", fontsize="small")
    ax.invert_yaxis()
    ax.set(xlabel="memory of a training step (MB)", xlim=(0, 1.12 * left.max()))
    ax.tick_params(axis="y", length=0)
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_cost_by_depth(frame: pd.DataFrame, value: str, ax: Axes | None = None) -> Axes:
    """A cost against the number of blocks, on logarithmic axes: one line per kind of skip connection.

    Args:
        frame: One row per stack of blocks: ``kind``, ``num_blocks`` and the column `value`, all above 0.
        value: ``"num_parameters"``, ``"peak_megabytes"`` (of 10^6 bytes) or ``"gradient_gain"``, the norm of the
            gradient at the input of the stack over that at its output.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If `value` is unknown, columns are missing, or a number of blocks occurs twice for a kind.
    """
    require_choice("value", value, _COSTS)
    frame = checked("frame", frame, value, ["kind", "num_blocks"])
    ax = axes_of(ax)
    for (kind, rows), marker in zip(groups_of(frame, ["kind"], "num_blocks"), cycle(MARKERS), strict=False):
        ax.plot(rows["num_blocks"], rows[value], marker=marker, label=str(kind), linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="blocks", ylabel=_COSTS[value])
    ax.set_xticks(sorted(frame["num_blocks"].unique()))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    return ax

"""Figures of branch Jacobians (Li and Papyan 2023): singular values by depth, alignment of blocks."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from resnet_paths._utils.arguments import require_choice
from resnet_paths.figures.layout import axes_of, checked, draw_map, mark_stages

__all__ = ["plot_residual_alignment", "plot_singular_values"]

_ALIGNMENTS = {
    "left_right": "alignment of left and right vectors",
    "left_left": "alignment of left vectors",
    "right_right": "alignment of right vectors",
    "leading_cosine": "cosine of the first vectors",
}


def plot_singular_values(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Leading singular values of the branch Jacobian of each block, on a logarithmic axis: one line per order.

    Args:
        frame: From ``resnet_paths.jacobian_svd(...).to_frame()``.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes. The largest singular value has order 0 and is darkest; bars are 1.96 standard errors, and marks on
        top show where a new stage starts.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, or a block and order occur twice.
    """
    frame = checked("frame", frame, "singular_value", ["block_index", "order"], ["singular_value_se", "stage"])
    ax = axes_of(ax)
    orders = sorted(frame["order"].unique())
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(orders)))
    for order, colour in zip(orders, colours, strict=True):
        rows = frame[frame["order"] == order].sort_values("block_index")
        error = 1.96 * rows["singular_value_se"]
        style: dict[str, Any] = {"marker": "o", "markersize": 1.5, "linewidth": 0.8, "elinewidth": 0.5}
        ax.errorbar(rows["block_index"], rows["singular_value"], yerr=error, color=colour, label=f"{order}", **style)
    of_block = frame.drop_duplicates("block_index").sort_values("block_index")
    x = of_block["block_index"]
    ax.set(yscale="log", xlabel="block (index from 0)", ylabel="singular value", xlim=(x.min() - 0.8, x.max() + 0.8))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    starts = x[of_block["stage"].diff() > 0].tolist()
    if starts:
        mark_stages(ax, starts)
    ax.legend(title="order", ncols=2)
    return ax


def plot_residual_alignment(frame: pd.DataFrame, ax: Axes | None = None, value: str = "left_right") -> Axes:
    """Heat map of the alignment of each pair of blocks.

    Args:
        frame: From `resnet_paths.residual_alignment`.
        ax: The axes to draw into; the current axes if None.
        value: ``"left_right"``, ``"left_left"``, ``"right_right"`` or ``"leading_cosine"``.

    Returns:
        The axes, with a colour bar. The left vectors are those of the block in the row; pairs of blocks whose spaces
        have different sizes are grey.

    Raises:
        ResnetPathsError: If `value` is unknown, columns are missing, all values are NaN, or a pair of blocks occurs
            twice.
    """
    require_choice("value", value, _ALIGNMENTS)
    frame = checked("frame", frame, value, ["block_index", "other_index"])
    ax = axes_of(ax)
    blocks = np.arange(frame["block_index"].min(), frame["block_index"].max() + 1)
    table = frame.pivot_table(index="block_index", columns="other_index", values=value)
    table = table.reindex(index=blocks, columns=blocks).astype(float)
    draw_map(ax, blocks, blocks, table.to_numpy(), _ALIGNMENTS[value], "viridis")
    ax.set(xlabel="block (index from 0)", ylabel="block (index from 0)")
    ax.yaxis.set_inverted(True)
    return ax

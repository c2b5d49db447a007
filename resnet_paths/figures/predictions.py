"""Figures of the prediction by path length."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures.layout import INK, checked

__all__ = ["plot_prediction_by_path_length"]


def plot_prediction_by_path_length(
    frame: pd.DataFrame, ax: Axes | None = None, gradient: pd.DataFrame | None = None
) -> Axes:
    """The share of each path length in the output, with its 95 % interval; below it that of the gradient.

    Args:
        frame: From `resnet_paths.prediction_by_path_length`, without rows by source.
        ax: The axes to draw into; the current axes if None.
        gradient: From `resnet_paths.gradient_by_path_length`: its ``gradient_share``, with 1.96 standard errors,
            is drawn into new axes below, which share the place of `ax` in its figure. None to leave it out.

    Returns:
        The axes of the prediction.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, a length occurs twice, or `ax` has no
            place in a grid that could be divided.
    """
    frame = checked("frame", frame, "share", ["path_length"], ["share_low", "share_high"])
    if gradient is not None:
        gradient = checked("gradient", gradient, "gradient_share", ["path_length"], ["gradient_share_se"])
    ax = plt.gca() if ax is None else ax
    _draw_shares(ax, frame["path_length"], frame["share"], frame[["share_low", "share_high"]].to_numpy().T, 0)
    ax.set(xlabel="path length (blocks)", ylabel="prediction (%)")
    if gradient is not None:
        # Both in the place of the axes, in a way that the layout of the figure knows.
        place = ax.get_subplotspec()
        if place is None:
            raise ResnetPathsError("ax", "axes at a free position", "axes made by plt.subplots where gradient is given")
        halves = place.subgridspec(2, 1)
        ax.set_subplotspec(halves[0])
        below = ax.figure.add_subplot(halves[1], sharex=ax)
        share, error = gradient["gradient_share"], 1.96 * gradient["gradient_share_se"]
        _draw_shares(below, gradient["path_length"], share, np.stack([share - error, share + error]), 1)
        below.set(xlabel="path length (blocks)", ylabel="gradient (%)")
        ax.set_xlabel("")
        ax.tick_params(labelbottom=False)
    return ax


def _draw_shares(ax: Axes, lengths: pd.Series, shares: pd.Series, interval: np.ndarray, colour: int) -> None:
    distance = 100 * np.abs(interval - shares.to_numpy())
    ax.bar(lengths, 100 * shares, width=0.8, color=f"C{colour}", yerr=distance, error_kw={"elinewidth": 0.5})
    ax.axhline(0, color=INK, linewidth=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))

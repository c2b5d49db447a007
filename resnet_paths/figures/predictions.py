"""Figures of the prediction by path length."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.axes_grid1 import make_axes_locatable

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
            is drawn into new axes of the same size below, with the same horizontal axis. None to leave it out.

    Returns:
        The axes of the prediction.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, or a length occurs twice.
    """
    frame = checked("frame", frame, "share", ["path_length"], ["share_low", "share_high"])
    if gradient is not None:
        gradient = checked("gradient", gradient, "gradient_share", ["path_length"], ["gradient_share_se"])
    ax = plt.gca() if ax is None else ax
    _draw_shares(ax, frame["path_length"], frame["share"], frame[["share_low", "share_high"]].to_numpy().T, 0)
    ax.set(xlabel="path length (blocks)", ylabel="prediction (%)")
    if gradient is not None:
        below = make_axes_locatable(ax).append_axes("bottom", size="100%", pad=0.1, sharex=ax)
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

"""Frames to draw, every plot that takes one, and what is read back from the axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.legend import Legend

import resnet_paths as rp
from resnet_paths.figures import (
    plot_path_histogram,
    plot_single_deletions,
    plot_training_curves,
    plot_unraveled_graph,
)


def deletions(network: str = "preact-resnet-56", num_blocks: int = 27, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    rate = generator.uniform(0.08, 0.9, num_blocks)
    return pd.DataFrame({
        "network": network,
        "block_index": range(num_blocks),
        "error_rate": rate,
        "error_rate_low": rate - 0.03,
        "error_rate_high": rate + 0.02,
        "intact_error_rate": 0.07 + 0.01 * seed,
    })


def published() -> pd.DataFrame:
    return pd.DataFrame({
        "network": "preact-resnet-20",
        "dataset": "CIFAR-10",
        "block_index": [0, 1, 2],
        "error_percent": [69.98, 19.97, 44.74],
        "intact_error_percent": 8.495,
    })


def curves() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [
        {"network": network, "seed": seed, "epoch": epoch, "train_loss": 3 * generator.random()}
        | {name: generator.random() for name in ("train_error_rate", "test_loss", "test_error_rate")}
        for network in ("residual", "plain")
        for seed in range(3)
        for epoch in range(1, 6)
    ]
    return pd.DataFrame(rows)


def histograms() -> pd.DataFrame:
    return pd.concat([rp.path_histogram(n).assign(network=f"{n} blocks") for n in (9, 27)])


PLOTS: dict[str, Callable[[], Axes]] = {
    "histogram": lambda: plot_path_histogram(histograms()),
    "deletions": lambda: plot_single_deletions(deletions(), published=published(), stage_starts=[9, 18], chance=0.9),
    "graph": lambda: plot_unraveled_graph(rp.unraveled_graph(3), highlight=(True, False, True)),
    "curves": lambda: plot_training_curves(curves()),
}


def line(ax: Axes, label: str) -> np.ndarray[Any, Any]:
    (found,) = [drawn for drawn in ax.lines if drawn.get_label() == label]
    return np.asarray(found.get_xydata())


def legend_texts(ax: Axes) -> list[str]:
    return [text.get_text() for legend in ax.findobj(Legend) for text in legend.get_texts()]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def routes(ax: Axes, gid: str) -> list[np.ndarray[Any, Any]]:
    collections = [c for c in ax.collections if isinstance(c, PathCollection) and c.get_gid() == gid]
    return [path.vertices for collection in collections for path in collection.get_paths()]


def boxes(ax: Axes) -> list[str]:
    return sorted(text.get_text() for text in ax.texts if text.get_bbox_patch() is not None)


def error_bars(ax: Axes, label: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The line with its error bars, [point, (x, y)] and [point, (low, high)]."""
    (found,) = [c for c in ax.containers if isinstance(c, ErrorbarContainer) and c.get_label() == label]
    segments = found.lines[2][0].get_segments() if found.lines[2] else []
    return np.asarray(found.lines[0].get_xydata()), np.array([segment[:, 1] for segment in segments if len(segment)])

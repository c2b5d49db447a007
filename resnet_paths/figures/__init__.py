"""Figures for papers: plot functions from data frames to matplotlib Axes, and files of exact column width.

    with rp.figures.paper_style("single"):
        fig, ax = plt.subplots()
        rp.figures.plot_path_histogram(rp.path_histogram(54), ax)
        rp.figures.save_figure(fig, "figures/paths", data=rp.path_histogram(54))

Create, plot and save the figure inside the ``with`` block, since matplotlib reads some settings only when it draws.
Networks are distinguished by marker or dashes as well as by colour, so that every figure is readable in grey. Every
function validates its frame before drawing, and draws the values of the frame without smoothing or estimation.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import lazy_loader
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from resnet_paths._utils.arguments import require_choice
from resnet_paths.figures.blocks import (
    plot_block_directions,
    plot_block_norms,
    plot_gradient_by_depth,
    plot_scalar_gradients,
)
from resnet_paths.figures.chains import plot_chain
from resnet_paths.figures.costs import plot_cost_by_depth, plot_training_memory
from resnet_paths.figures.gradients import (
    plot_block_independence,
    plot_coherence,
    plot_effective_window,
    plot_pair_covariances,
    plot_path_gradients,
    plot_path_shares,
    plot_windows,
)
from resnet_paths.figures.graphs import plot_unraveled_graph
from resnet_paths.figures.jacobians import plot_residual_alignment, plot_singular_values
from resnet_paths.figures.layout import MARKERS, axes_of, checked, groups_of, legend_above, whole_numbers_from_zero
from resnet_paths.figures.lesions import (
    plot_layer_schedules,
    plot_lesion_counts,
    plot_pair_interactions,
    plot_predicted_effects,
    plot_reorderings,
    plot_scalings,
    plot_score_correlations,
    plot_single_deletions,
)
from resnet_paths.figures.predictions import (
    plot_deletion_account,
    plot_effect_matrix,
    plot_iterative_inference,
    plot_lens,
    plot_prediction_by_path_length,
    plot_prediction_by_source,
    plot_waterfall,
)
from resnet_paths.figures.ranges import plot_range_deletions, plot_range_repeats
from resnet_paths.figures.style import paper_style, save_figure, weights_hash
from resnet_paths.figures.subsets import plot_interaction_spectrum, plot_shapley_interactions, plot_shapley_values

if not TYPE_CHECKING:  # a type checker would accept any name of this module
    # Imported on first use, since it needs ipywidgets.
    __getattr__, _, _ = lazy_loader.attach(__name__, submodules=["widgets"])

__all__ = [
    "paper_style",
    "plot_block_directions",
    "plot_block_independence",
    "plot_block_norms",
    "plot_chain",
    "plot_coherence",
    "plot_cost_by_depth",
    "plot_deletion_account",
    "plot_effect_matrix",
    "plot_effective_window",
    "plot_gradient_by_depth",
    "plot_interaction_spectrum",
    "plot_iterative_inference",
    "plot_layer_schedules",
    "plot_lens",
    "plot_lesion_counts",
    "plot_pair_covariances",
    "plot_pair_interactions",
    "plot_path_gradients",
    "plot_path_histogram",
    "plot_path_shares",
    "plot_predicted_effects",
    "plot_prediction_by_path_length",
    "plot_prediction_by_source",
    "plot_range_deletions",
    "plot_range_repeats",
    "plot_reorderings",
    "plot_residual_alignment",
    "plot_scalar_gradients",
    "plot_scalings",
    "plot_score_correlations",
    "plot_shapley_interactions",
    "plot_shapley_values",
    "plot_single_deletions",
    "plot_singular_values",
    "plot_training_curves",
    "plot_training_memory",
    "plot_unraveled_graph",
    "plot_waterfall",
    "plot_windows",
    "save_figure",
    "weights_hash",
]

_CURVE_LABELS = {
    "train_loss": "training loss (nats)",
    "train_error_rate": "training error (%)",
    "test_loss": "test loss (nats)",
    "test_error_rate": "test error (%)",
}


def plot_path_histogram(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of the paths at each path length (Veit et al. 2016, figure 6a): bars, or one line per network.

    Args:
        frame: From `resnet_paths.path_histogram`: ``path_length``, ``fraction``; an
            optional column ``network`` separates several networks and names them in the legend.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, or a length occurs twice in one network.
    """
    by = ["network"] if isinstance(frame, pd.DataFrame) and "network" in frame else []
    frame = checked("frame", frame, "fraction", [*by, "path_length"], rate=True)
    ax = axes_of(ax)
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


def plot_training_curves(frame: pd.DataFrame, ax: Axes | None = None, value: str = "test_error_rate") -> Axes:
    """A quantity of training against the epoch: mean over seeds, with a band from the minimum to the maximum.

    Args:
        frame: One row per epoch: ``network``, ``seed``, ``epoch`` and the column `value`.
        ax: The axes to draw into; the current axes if None.
        value: ``"train_loss"``, ``"train_error_rate"``, ``"test_loss"`` or ``"test_error_rate"``; rates are drawn in
            percent.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If `value` is unknown, columns are missing, all values are NaN, an epoch occurs twice in one
            run, or a rate is not in [0, 1].
    """
    require_choice("value", value, _CURVE_LABELS)
    rate = value.endswith("_rate")
    frame = checked("frame", frame, value, ["network", "seed", "epoch"], rate=rate)
    ax = axes_of(ax)
    colours = [f"C{index}" for index in range(frame["network"].nunique())]
    frame = frame.assign(**{value: frame[value] * (100 if rate else 1)})
    sns.lineplot(
        frame, x="epoch", y=value, hue="network", style="network", palette=colours, errorbar=("pi", 100), ax=ax
    )
    ax.set(xlabel="epoch", ylabel=_CURVE_LABELS[value])
    whole_numbers_from_zero(ax)
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax

"""Figures of predictions: by path length and source, lenses, effects of deletions, contributions to one output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from resnet_paths._utils.arguments import require_choice, require_float, require_int
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures.layout import (
    INK,
    MARKERS,
    axes_of,
    checked,
    draw_map,
    groups_of,
    label_and_scale,
    legend_above,
    mark_stages,
    unit_of,
)

__all__ = [
    "plot_deletion_account",
    "plot_effect_matrix",
    "plot_iterative_inference",
    "plot_lens",
    "plot_prediction_by_path_length",
    "plot_prediction_by_source",
    "plot_waterfall",
]

_SPLIT_LABELS = {
    "share": "prediction",
    "contribution": "contribution",
    "mean_absolute_contribution": "mean absolute\ncontribution",
}
_MOST_NAMES = 14  # rows that can be labelled by name
_LENS_LABELS = {
    "kl_divergence": "KL divergence from the output (nats)",
    "agreement": "agreement with the prediction (%)",
    "prediction_rank": "rank of the prediction",
}
_ITERATIVE_LABELS = {
    "cross_entropy": "cross-entropy of the early exit (nats)",
    "cross_entropy_change": "change of the cross-entropy (nats)",
    "first_order_change": "first-order change (nats)",
    "error_rate": "error of the early exit (%)",
    "final_share": "final predictions (%)",
    "gradient_cosine": "cosine of update and gradient",
    "early_exit_gradient_cosine": "cosine of update and gradient of the exit",
    "update_ratio": "norm of update / norm of state",
    "state_angle": "angle between states (degrees)",
    "update_angle": "angle between updates (degrees)",
}
_EFFECT_LABELS = {
    "relative_change": "relative change of the branch (%)",
    "max_relative_change": "largest relative change of the branch (%)",
    "direct_effect_change": "change of the direct effect",
}
_ACCOUNT_TERMS = {"later_change": "later blocks", "head_change": "head", "skip_change": "skips"}


def plot_prediction_by_path_length(
    frame: pd.DataFrame, ax: Axes | None = None, gradient: pd.DataFrame | None = None, value: str = "share"
) -> Axes:
    """The share of each path length in the output, with its 95 % interval; below it that of the gradient.

    If the output is near 0, shares are large and of both signs: ``"mean_absolute_contribution"`` is easier to read.

    Args:
        frame: From `resnet_paths.prediction_by_path_length`, without rows by source.
        ax: The axes to draw into; the current axes if None.
        gradient: From `resnet_paths.gradient_by_path_length`: its ``gradient_share``, with 1.96 standard errors,
            is drawn into new axes below, which share the place of `ax` in its figure. None to leave it out.
        value: ``"share"`` in percent; ``"contribution"``, the mean over examples, in the unit of the output and with
            1.96 standard errors; or ``"mean_absolute_contribution"``, in that unit and without an interval.

    Returns:
        The axes of the prediction.

    Raises:
        ResnetPathsError: If `value` is unknown, columns are missing, all values are NaN, a length occurs twice, or `ax`
            has no place in a grid that could be divided.
    """
    require_choice("value", value, _SPLIT_LABELS)
    bounds = {"share": ["share_low", "share_high"], "contribution": ["contribution_se"]}.get(value, [])
    frame = checked("frame", frame, value, ["path_length"], bounds)
    if gradient is not None:
        gradient = checked("gradient", gradient, "gradient_share", ["path_length"], ["gradient_share_se"])
    ax = axes_of(ax)
    heights, interval, unit = frame[value], None, unit_of(_output_of(frame))
    if value == "share":
        heights, interval, unit = 100 * heights, 100 * frame[bounds].to_numpy().T, "%"
    elif bounds:
        error = 1.96 * frame[bounds[0]]
        interval = np.stack([heights - error, heights + error])
    _draw_bars(ax, frame["path_length"], heights, 0, interval)
    ax.set(xlabel="path length (blocks)", ylabel=_SPLIT_LABELS[value] + _in_parentheses(unit))
    if gradient is not None:
        below = _beside(ax, "gradient", rows=2, sharex=ax)
        share, error = 100 * gradient["gradient_share"], 196 * gradient["gradient_share_se"]
        _draw_bars(below, gradient["path_length"], share, 1, np.stack([share - error, share + error]))
        below.set(xlabel="path length (blocks)", ylabel="gradient (%)")
        ax.set_xlabel("")
        ax.tick_params(labelbottom=False)
    return ax


def plot_prediction_by_source(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heat map of the share of each source and path length in the output.

    Args:
        frame: From `resnet_paths.prediction_by_path_length` with ``by_source=True``.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes, with a colour bar in percent, centred at 0. Cells without paths are grey.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, or a source and length occur twice.
    """
    frame = checked("frame", frame, "share", ["source", "path_length"], ["block_index"])
    ax = axes_of(ax)
    numbers = frame.groupby("source", sort=False)["block_index"].first()
    names = list(numbers.index)
    table = frame.pivot_table(index="source", columns="path_length", values="share").reindex(names)
    draw_map(ax, table.columns, np.arange(len(names)), 100 * table.to_numpy(), "share of the prediction (%)")
    ax.set(xlabel="path length from the source (blocks)", ylabel="source")
    ax.yaxis.set_inverted(True)
    shown = names
    if len(names) > _MOST_NAMES:  # numbers of blocks, as in the other figures
        shown = [name if pd.isna(i) else str(int(i)) if i and i % 10 == 0 else "" for name, i in numbers.items()]
    ax.set_yticks([i for i, name in enumerate(shown) if name], [name for name in shown if name])
    return ax


def plot_lens(frame: pd.DataFrame, ax: Axes | None = None, value: str = "kl_divergence") -> Axes:
    """Heat map of a lens over states and path lengths; a line if there is one length only, as for the logit lens.

    Args:
        frame: From `resnet_paths.lens`.
        ax: The axes to draw into; the current axes if None.
        value: ``"kl_divergence"``, ``"agreement"`` or ``"prediction_rank"``.

    Returns:
        The axes. The line has bars of the 95 % interval; a heat map has a colour bar, and cells without paths are grey.

    Raises:
        ResnetPathsError: If `value` is unknown, columns are missing, all values are NaN, or a state and length occur
            twice.
    """
    require_choice("value", value, _LENS_LABELS)
    bounds = ["agreement_low", "agreement_high"] if value == "agreement" else [f"{value}_se"]
    frame = checked("frame", frame, value, ["depth", "path_length"], bounds)
    ax = axes_of(ax)
    scale = 100 if value == "agreement" else 1
    lengths = frame["path_length"].to_numpy()
    if (lengths == lengths[0]).all():
        y = scale * frame[value].to_numpy()
        if value == "agreement":
            low, high = scale * frame[bounds].to_numpy().T
            error = np.stack([y - low, high - y])
        else:
            error = np.stack([1.96 * frame[bounds[0]].to_numpy()] * 2)
        ax.errorbar(frame["depth"], y, yerr=error, marker="o", color="C0", elinewidth=0.8)
        ax.set(ylabel=_LENS_LABELS[value])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    else:
        table = scale * frame.pivot_table(index="path_length", columns="depth", values=value)
        draw_map(ax, table.columns, table.index, table.to_numpy(), _LENS_LABELS[value], "viridis")
        ax.set(ylabel="branches of later blocks (at most)")
    ax.set(xlabel="blocks before the state")
    return ax


def plot_iterative_inference(frame: pd.DataFrame, ax: Axes | None = None, value: str = "cross_entropy") -> Axes:
    """One column of iterative inference against the block (Jastrzębski et al. 2018), with bars of 95 % intervals.

    Args:
        frame: From `resnet_paths.iterative_inference`; an optional column ``network`` separates several networks and
            names them in the legend.
        ax: The axes to draw into; the current axes if None.
        value: A column with an interval or a standard error, such as ``"gradient_cosine"``.

    Returns:
        The axes. Marks on top show where a new stage starts, for a single network; NaN leaves a gap.

    Raises:
        ResnetPathsError: If `value` is unknown, columns are missing, all values are NaN, or a block occurs twice in one
            network.
    """
    require_choice("value", value, _ITERATIVE_LABELS)
    is_rate = value in ("error_rate", "final_share")
    bounds = [f"{value}_low", f"{value}_high"] if is_rate else [f"{value}_se"]
    by = ["network"] if isinstance(frame, pd.DataFrame) and "network" in frame else []
    frame = checked("frame", frame, value, [*by, "block_index"], [*bounds, *([] if by else ["stage"])])
    ax = axes_of(ax)
    for place, (network, rows) in enumerate(groups_of(frame, by, "block_index")):
        y = (100 if is_rate else 1) * rows[value].to_numpy()
        if is_rate:
            low, high = 100 * rows[bounds].to_numpy().T
            errors = np.stack([y - low, high - y])
        else:
            errors = 1.96 * rows[bounds[0]].to_numpy()
        marker = MARKERS[place % len(MARKERS)]
        style: dict[str, Any] = {"markersize": 2.5, "linewidth": 0.8, "elinewidth": 0.5}
        ax.errorbar(rows["block_index"], y, yerr=errors, marker=marker, color=f"C{place}", label=network, **style)
    if value.endswith(("change", "cosine")):
        ax.axhline(0, color=INK, linewidth=0.5, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set(xlabel="block (index from 0)", ylabel=_ITERATIVE_LABELS[value])
    if by:
        legend_above(ax, ax.get_legend_handles_labels()[0])
        return ax
    x = frame.sort_values("block_index")
    ax.set_xlim(x["block_index"].min() - 0.8, x["block_index"].max() + 0.8)
    starts = x["block_index"][x["stage"].diff() > 0].tolist()
    if starts:
        mark_stages(ax, starts)
    return ax


def plot_effect_matrix(
    frame: pd.DataFrame, ax: Axes | None = None, value: str = "relative_change", vmax: float | None = None
) -> Axes:
    """Heat map of the change of each later block when a block is deleted (Csordás et al. 2025).

    Args:
        frame: From `resnet_paths.effect_matrix`, for deletions of single blocks.
        ax: The axes to draw into; the current axes if None.
        value: ``"relative_change"``, ``"max_relative_change"`` or ``"direct_effect_change"``.
        vmax: End of the colour bar, in the column's unit, for equal colours in several figures; the largest value if
            None.

    Returns:
        The axes, with a colour bar that begins at 0; that of ``"direct_effect_change"`` is centred at 0.

    Raises:
        ResnetPathsError: If `value` is unknown, `vmax` is not above 0, columns are missing, all values are NaN, or a
            pair of blocks occurs twice.
    """
    require_choice("value", value, _EFFECT_LABELS)
    allowed = "a finite number above 0, or None"
    if vmax is not None and not require_float("vmax", vmax, allowed) > 0:
        raise ResnetPathsError("vmax", vmax, allowed)
    frame = checked("frame", frame, value, ["deleted_index", "block_index"])
    ax = axes_of(ax)
    blocks = np.arange(frame["deleted_index"].min(), frame["block_index"].max() + 1)
    table = frame.pivot_table(index="deleted_index", columns="block_index", values=value)
    table = table.reindex(index=blocks, columns=blocks).astype(float)
    label = _EFFECT_LABELS[value]
    if value == "direct_effect_change":
        label += _in_parentheses(unit_of(_output_of(frame)))
        draw_map(ax, blocks, blocks, table.to_numpy(), label, vmin=None if vmax is None else -vmax, vmax=vmax)
    else:  # a norm, which is never negative
        most = None if vmax is None else 100 * vmax
        draw_map(ax, blocks, blocks, 100 * table.to_numpy(), label, "viridis", vmin=0, vmax=most)
    ax.set(xlabel="later block (index from 0)", ylabel="deleted block", facecolor="none")
    ax.yaxis.set_inverted(True)
    return ax


def plot_deletion_account(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The terms of the change of the output by deleted block, as stacked bars; dots are their sum, the total effect.

    Args:
        frame: From `resnet_paths.deletion_account`, for deletions of single blocks.
        ax: The axes to draw into; the current axes if None.

    Returns:
        The axes.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, or a block occurs twice.
    """
    frame = checked("frame", frame, "total_effect", ["deleted_index"], ["direct_effect", *_ACCOUNT_TERMS])
    ax = axes_of(ax)
    blocks = frame["deleted_index"].astype(int)
    terms = {"direct effect, removed": -frame["direct_effect"]}
    # A term that is 0 up to rounding is not in the legend.
    least = 1e-6 * frame["total_effect"].abs().max()
    terms |= {label: frame[column] for column, label in _ACCOUNT_TERMS.items() if frame[column].abs().max() > least}
    # Positive and negative terms are stacked apart, so that each bar keeps its length.
    ends = {sign: np.zeros(len(frame)) for sign in (1, -1)}
    for place, (label, values) in enumerate(terms.items()):
        for sign in ends:
            part = np.where(np.sign(values) == sign, values, 0.0)
            ax.bar(blocks, part, 0.85, ends[sign], color=f"C{place}", label=label if sign == 1 else None)
            ends[sign] = ends[sign] + part
    ax.plot(blocks, frame["total_effect"], color=INK, marker="o", markersize=2, linestyle="none", label="total effect")
    ax.use_sticky_edges = False  # bars would end at the frame, and dots be cut off
    ax.axhline(0, color=INK, linewidth=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set(xlabel="deleted block", ylabel=f"change of the {_output_of(frame)}")
    legend_above(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_waterfall(
    frame: pd.DataFrame, ax: Axes | None = None, image: torch.Tensor | np.ndarray | None = None, num_bars: int = 12
) -> Axes:
    """The contributions to the output one after the other, from 0 to the output; beside them the image.

    Args:
        frame: From `resnet_paths.direct_effects` or `resnet_paths.prediction_by_path_length`, for a single example as a
            rule; for several, the mean is drawn. Rows of one source are added up.
        ax: The axes to draw into; the current axes if None.
        image: The input, [channel, height, width] or [height, width], scaled to its range; it is drawn into new axes on
            the left, which share the place of `ax` in its figure. None to leave it out.
        num_bars: Number of contributions with a bar of their own, the largest by magnitude; the others have one
            together.

    Returns:
        The axes of the contributions, first source on top.

    Raises:
        ResnetPathsError: If columns are missing, all values are NaN, `num_bars` is below 1, the image has another
            shape, or `ax` has no place in a grid that could be divided.
    """
    value = "direct_effect" if isinstance(frame, pd.DataFrame) and "direct_effect" in frame else "contribution"
    key = "source" if isinstance(frame, pd.DataFrame) and "source" in frame else "path_length"
    frame = checked("frame", frame, value, [key, "path_length"] if value == "contribution" else [key])
    num_bars = require_int("num_bars", num_bars, 1)
    ax = axes_of(ax)
    if image is not None:
        _draw_image(_beside(ax, "image", columns=(1, 2)), image)
    names, values = _largest(frame.groupby(key, sort=False)[value].sum(), num_bars)
    ends = np.cumsum(values)
    starts = ends - values
    rows = np.arange(len(values))
    digits = max(2 - math.floor(math.log10(np.abs([*values, ends[-1]]).max() or 1.0)), 0)  # three of the largest
    colours = ["C0" if number >= 0 else "C1" for number in values]
    ax.barh(rows, values, left=starts, color=colours, height=0.7)
    ax.vlines(ends[:-1], rows[:-1], rows[1:], color=INK, linewidth=0.5)
    ax.barh(len(rows), ends[-1], color="0.5", height=0.7)
    for row, (number, left, right) in enumerate(zip([*values, ends[-1]], [*starts, 0], [*ends, ends[-1]], strict=True)):
        text = f"{number:+.{digits}f}" if row < len(values) else f"{number:.{digits}f}"
        place: dict[str, Any] = {"xytext": (2, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
        ax.annotate(text, (max(left, right), row), **place)
    ax.axvline(0, color=INK, linewidth=0.5)
    output = str(frame.attrs.get("output", "output")).replace("_", " ")
    ax.set_yticks([*rows, len(rows)], [*names, output])
    ax.set(
        xlabel=f"contribution to the {_output_of(frame)}", ylabel="path length (blocks)" if key == "path_length" else ""
    )
    ax.yaxis.set_inverted(True)
    low, high = min(0, starts.min(), ends.min()), max(0, starts.max(), ends.max())
    room = (high - low) or 1.0
    ax.set_xlim(low - 0.03 * room if low < 0 else 0, high + 0.18 * room)  # for the numbers
    return ax


def _largest(values: pd.Series, num_bars: int) -> tuple[list[str], np.ndarray]:
    """Names and contributions of the largest, in their order, and the sum of the others."""
    if len(values) <= num_bars:
        return [str(name) for name in values.index], values.to_numpy()
    chosen = values.abs().rank(ascending=False, method="first") <= num_bars
    others = values[~chosen]
    names = [*(str(name) for name in values[chosen].index), f"{len(others)} others"]
    return names, np.append(values[chosen].to_numpy(), others.sum())


def _draw_image(ax: Axes, image: torch.Tensor | np.ndarray) -> None:
    allowed = "an image [height, width] or [1 or 3, height, width]"
    if not isinstance(image, torch.Tensor | np.ndarray):
        raise ResnetPathsError("image", type(image).__name__, allowed)
    pixels = np.asarray(torch.as_tensor(image).detach().cpu(), dtype=float)
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise ResnetPathsError("image", list(np.shape(image)), allowed)
    low, high = pixels.min(), pixels.max()
    ax.imshow((pixels - low) / ((high - low) or 1.0), cmap="gray", interpolation="nearest")
    ax.set_axis_off()


def _beside(ax: Axes, argument: str, rows: int = 1, columns: Sequence[int] = (1,), **options: Any) -> Axes:
    """New axes in the place of `ax`, in a way that the layout of the figure knows: below it, or left of it."""
    place = ax.get_subplotspec()
    if place is None:
        raise ResnetPathsError("ax", "axes at a free position", f"axes made by plt.subplots where {argument} is given")
    cells = place.subgridspec(rows, len(columns), width_ratios=list(columns))
    own, new = (0, 1) if rows > 1 else (1, 0)
    ax.set_subplotspec(cells[own])
    made: Axes = ax.figure.add_subplot(cells[new], **options)
    return made


def _output_of(frame: pd.DataFrame) -> str:
    """The output that a frame is about, with its unit."""
    return label_and_scale(str(frame.attrs.get("output", "output")))[0]


def _in_parentheses(text: str) -> str:
    return f" ({text})" if text else ""


def _draw_bars(
    ax: Axes, lengths: pd.Series, values: pd.Series, colour: int, interval: np.ndarray | None = None
) -> None:
    distance = None if interval is None else np.abs(interval - values.to_numpy())
    ax.bar(lengths, values, width=0.8, color=f"C{colour}", yerr=distance, error_kw={"elinewidth": 0.5})
    ax.axhline(0, color=INK, linewidth=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))

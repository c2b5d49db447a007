"""Interactive explorers for notebooks: sliders and buttons that update a sentence and a figure.

    rp.widgets.explore_gradient_highway()           the product of F' against the product of 1 + F', any depth
    rp.widgets.explore_blocks(chain, loader)        norms in a block; its branch scaled from 0.1 to 2.0
    rp.widgets.explore_lesions(chain, loader)       blocks deleted and restored: error and remaining paths
    rp.widgets.explore_paths()                      one path highlighted among all paths
    rp.widgets.explore_prediction(chain, images)    the margin of an image by source and path length; a block deleted

Each explorer calls functions of the library and draws their results with functions of `resnet_paths.figures`. The
docstrings name these functions, for static versions of the figures.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resnet_paths._utils.arguments import require_int
from resnet_paths._utils.errors import ResnetPathsError, requires_extra
from resnet_paths.core.block_norms import block_norms
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.edits import delete_blocks
from resnet_paths.core.paths import path_histogram, path_length
from resnet_paths.core.polynomials import shown_count
from resnet_paths.core.unraveled_graph import unraveled_graph
from resnet_paths.figures import (
    paper_style,
    plot_block_norms,
    plot_lesion_counts,
    plot_path_histogram,
    plot_prediction_by_source,
    plot_scalar_gradients,
    plot_scalings,
    plot_unraveled_graph,
    plot_waterfall,
)
from resnet_paths.gradients import scalar_gradients
from resnet_paths.gradients.scalar import ACTIVATIONS
from resnet_paths.lesions import lesion_study
from resnet_paths.lesions.lesion import Lesion
from resnet_paths.lesions.plans import scalings, single_deletions
from resnet_paths.predictions import prediction_by_path_length
from resnet_paths.predictions.deletions import deletion_account

with requires_extra("notebooks"):
    import ipywidgets as ipw

__all__ = ["explore_blocks", "explore_gradient_highway", "explore_lesions", "explore_paths", "explore_prediction"]

Loader = Iterable[tuple[torch.Tensor, torch.Tensor]]

_MAX_BLOCKS = 5  # 32 paths are the most that can be labelled


def explore_gradient_highway(depth: int = 20, weight: float = 1.0, activation: str = "sigmoid") -> ipw.VBox:
    """Sliders for depth and weight of a chain of scalar layers: the gradient at its input, with and without +x.

    Static version: ``plot_scalar_gradients(scalar_gradients([weight] * depth, activation))``.

    Args:
        depth: Initial number of layers, 1 to 100.
        weight: Initial weight of every layer, -4 to 4.
        activation: Initial activation, ``"sigmoid"`` or ``"relu"``.

    Returns:
        The widget.

    Raises:
        ResnetPathsError: If a value is outside the range of its slider.
    """
    depth = require_int("depth", depth, 1, 100)
    _check_range("weight", weight, -4, 4)
    if activation not in ACTIVATIONS:
        raise ResnetPathsError("activation", activation, " or ".join(map(repr, ACTIVATIONS)))

    def answer(axes: Sequence[Axes], depth: int, weight: float, activation: str) -> str:
        frame = scalar_gradients([weight] * depth, activation)
        plain, residual = (frame[frame["network"] == name].gradient.iloc[-1] for name in ("plain", "residual"))
        words = (
            f"Through {depth} layers the product of F' is <b>{plain:.3g}</b>, the product of 1 + F' is "
            f"<b>{residual:.3g}</b>."
        )
        plot_scalar_gradients(frame, axes[0])
        return words

    controls = {
        "depth": ipw.IntSlider(depth, 1, 100, description="depth", continuous_update=False),
        "weight": ipw.FloatSlider(value=weight, min=-4, max=4, step=0.1, description="weight", continuous_update=False),
        "activation": ipw.ToggleButtons(options=ACTIVATIONS, value=activation, description="activation"),
    }
    return _explorer(controls, answer)


def explore_blocks(chain: ResidualChain, loader: Loader) -> ipw.VBox:
    """Norms of a block's input, branch and output, and the error as its branch is scaled by 0.1 to 2.0.

    Static version: ``plot_block_norms(block_norms(chain, loader))`` and ``plot_scalings`` of a `lesion_study` of
    `scalings`.

    Args:
        chain: The intact chain, in eval mode.
        loader: Batches of (inputs, labels), evaluated at each change of the slider; a few hundred images suffice.

    Returns:
        The widget.

    Raises:
        ResnetPathsError: See `block_norms` and `lesion_study`; also if no block has a branch.
    """
    norms = block_norms(chain, loader)
    blocks = {f"{index}: {block.name}": index for index, block in enumerate(chain) if block.branch is not None}
    if not blocks:
        raise ResnetPathsError("chain", f"{len(chain)} blocks without a branch", "a chain with at least one branch")
    known: dict[tuple[int, float], pd.DataFrame] = {}

    def answer(axes: Sequence[Axes], block: int, factor: float) -> str:
        if (block, factor) not in known:
            plan = [lesion for lesion in scalings(chain, [factor]) if lesion.blocks == (block,)]
            known[block, factor] = lesion_study(chain, loader, plan, progress=False)
        row, sizes = known[block, factor].iloc[0], norms.iloc[block]
        words = (
            f"<b>{html.escape(chain[block].name)}</b>: |x| = {sizes.input_norm:.3g}, |F(x)| = {sizes.branch_norm:.3g}, "
            f"|F(x) + x| = {sizes.sum_norm:.3g}, cosine of x and F(x) = {sizes.cosine:.2f}. With {factor:.1f} F(x): "
            f"test error <b>{row.error_rate:.1%}</b> (intact {row.intact_error_rate:.1%}; {row.num_examples} images)."
        )
        plot_block_norms(norms, axes[0], highlight=block)
        plot_scalings(pd.concat(frame for (index, _), frame in known.items() if index == block), axes[1])
        return words

    controls = {
        "block": ipw.Dropdown(options=blocks, description="block"),
        "factor": ipw.FloatSlider(value=1, min=0.1, max=2, step=0.1, description="factor", continuous_update=False),
    }
    return _explorer(controls, answer, num_axes=2)


def explore_lesions(chain: ResidualChain, loader: Loader) -> ipw.VBox:
    """One button per block that deletes or restores it: the error and the remaining paths.

    Static version: ``plot_path_histogram`` of the intact and the lesioned chain, and ``plot_lesion_counts`` of a
    `lesion_study` of `random_deletions`.

    Args:
        chain: The intact chain, in eval mode.
        loader: Batches of (inputs, labels), evaluated at each press of a button; a few hundred images suffice.

    Returns:
        The widget.

    Raises:
        ResnetPathsError: See `lesion_study`.
    """
    deletable = [index for lesion in single_deletions(chain) for index in lesion.blocks or ()]
    intact_paths = path_histogram(chain).assign(network=f"intact, {shown_count(chain.num_paths)} paths")
    known: dict[tuple[int, ...], pd.DataFrame] = {}

    def answer(axes: Sequence[Axes], **pressed: bool) -> str:
        deleted = tuple(index for index in deletable if pressed[str(index)])
        lesioned = delete_blocks(chain, deleted)
        if deleted not in known:
            lesion = Lesion("delete", deleted, name="delete")
            known[deleted] = lesion_study(chain, loader, [lesion], progress=False)
        row = known[deleted].iloc[0]
        names = ", ".join(html.escape(chain[index].name) for index in deleted) or "none"
        words = (
            f"Deleted: {names} ({len(deleted)} of {len(chain)}). "
            f"<b>{shown_count(lesioned.num_paths)}</b> of {shown_count(chain.num_paths)} "
            f"paths remain. Test error <b>{row.error_rate:.1%}</b> (intact {row.intact_error_rate:.1%}; "
            f"{row.num_examples} images)."
        )
        paths = path_histogram(lesioned).assign(network=f"remaining, {shown_count(lesioned.num_paths)} paths")
        plot_path_histogram(pd.concat([intact_paths, paths]) if deleted else intact_paths, axes[0])
        plot_lesion_counts(pd.concat(known.values()), axes[1])
        return words

    buttons = {str(index): _toggle(chain[index].name, "delete") for index in deletable}
    return _explorer(buttons, answer, num_axes=2, wrap=True)


def explore_paths(num_blocks: int = 3) -> ipw.VBox:
    """One path highlighted among all paths: one button per block, pressed where the path takes the branch.

    Static version: ``plot_unraveled_graph(unraveled_graph(num_blocks), highlight=path)``.

    Args:
        num_blocks: Initial number of blocks, 1 to 5.

    Returns:
        The widget.

    Raises:
        ResnetPathsError: If `num_blocks` is outside the range of its slider.
    """
    num_blocks = require_int("num_blocks", num_blocks, 1, _MAX_BLOCKS)
    buttons = {f"branch_{index}": _toggle(f"f{index + 1}", "branch of") for index in range(_MAX_BLOCKS)}

    def answer(axes: Sequence[Axes], num_blocks: int, **pressed: bool) -> str:
        for index, button in enumerate(buttons.values()):
            button.disabled = index >= num_blocks
        path = tuple(pressed[f"branch_{index}"] for index in range(num_blocks))
        length, counts = path_length(path), path_histogram(num_blocks)
        taken = " and ".join(f"f<sub>{index + 1}</sub>" for index, branch in enumerate(path) if branch) or "no branch"
        words = (
            f"This path takes {taken}: length <b>{length}</b>. {counts.num_paths[length]} of the {2**num_blocks} paths "
            f"have this length ({counts.fraction[length]:.1%})."
        )
        plot_unraveled_graph(unraveled_graph(num_blocks), axes[0], highlight=path)
        return words

    slider = ipw.IntSlider(num_blocks, 1, _MAX_BLOCKS, description="blocks", continuous_update=False)
    return _explorer({"num_blocks": slider, **buttons}, answer, aspect=0.5, wrap=True)


def explore_prediction(chain: ResidualChain, images: torch.Tensor) -> ipw.VBox:
    """A slider for the image and a menu for the deleted block: the margin by source and path length, and its change.

    Static version: ``plot_prediction_by_source(prediction_by_path_length(chain, images[i:i+1], by_source=True,
    linearization="detached"))``, `plot_waterfall` of the same frame, and `deletion_account`.

    Args:
        chain: The intact chain, in eval mode.
        images: Inputs [batch, channel, height, width].

    Returns:
        The widget.

    Raises:
        ResnetPathsError: If `images` are not images; also see `prediction_by_path_length`.
    """
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or not len(images):
        shown = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ResnetPathsError("images", shown, "a tensor [batch, channel, height, width] of at least one image")
    deletions = {lesion.name: lesion for lesion in single_deletions(chain)}
    known: dict[int, pd.DataFrame] = {}

    def answer(axes: Sequence[Axes], image: int, deleted: str) -> str:
        one = images[image : image + 1]
        if image not in known:
            known[image] = prediction_by_path_length(chain, one, by_source=True, linearization="detached")
        frame = known[image]
        margin = frame.attrs["mean_output"]
        of_stem = frame.loc[frame["source"] == "stem", "contribution"].sum()
        words = f"The margin of image {image} is <b>{margin:.3g}</b>, of which {of_stem:.3g} starts at the stem."
        plot_prediction_by_source(frame, axes[0])
        if deleted in deletions:
            row = deletion_account(chain, one, [deletions[deleted]]).iloc[0]
            terms = {
                "intact": margin,
                f"- {row.deleted}": -row.direct_effect,
                "later blocks": row.later_change,
                "skips": row.skip_change,
                "head": row.head_change,
            }
            words += (
                f" Without {html.escape(row.deleted)} it is <b>{margin + row.total_effect:.3g}</b>: "
                f"{-row.direct_effect:+.3g} by the direct effect of the block, {row.later_change:+.3g} by the later "
                f"blocks, {row.skip_change:+.3g} by their skips, {row.head_change:+.3g} by the head."
            )
            frame = pd.DataFrame({"source": list(terms), "direct_effect": list(terms.values())})
            frame.attrs["output"] = "margin"
        plot_waterfall(frame, axes[1], image=one[0])
        return words

    controls = {
        "image": ipw.IntSlider(0, 0, len(images) - 1, description="image", continuous_update=False),
        "deleted": ipw.Dropdown(options=["delete nothing", *deletions], description="deletion"),
    }
    return _explorer(controls, answer, num_axes=2)


def _explorer(
    controls: Mapping[str, ipw.Widget],
    answer: Callable[..., str],
    *,
    num_axes: int = 1,
    aspect: float = 0.4,
    wrap: bool = False,
) -> ipw.VBox:
    """Controls above a sentence and a figure; `answer` draws into the axes and returns the sentence at each change."""
    words, picture = ipw.HTML(), ipw.Image(format="png", layout=ipw.Layout(max_width="100%"))

    def update(_: object = None) -> None:
        with paper_style("double", aspect):
            figure = Figure()  # not from pyplot, which would display it a second time
            axes = figure.subplots(1, num_axes, squeeze=False)[0]
            text = answer(axes, **{name: control.value for name, control in controls.items()})
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=120)
        words.value, picture.value = text, png.getvalue()

    update()
    for control in controls.values():
        control.observe(update, "value")
    layout = ipw.Layout(flex_flow="row wrap") if wrap else ipw.Layout()
    panel = (ipw.Box if wrap else ipw.VBox)(list(controls.values()), layout=layout)
    return ipw.VBox([panel, words, picture])


def _toggle(name: str, verb: str) -> ipw.ToggleButton:
    """A toggle button with a check mark while it is pressed."""
    button = ipw.ToggleButton(description=name, tooltip=f"{verb} {name}", layout=ipw.Layout(width="auto"))

    def mark(change: Mapping[str, object]) -> None:
        button.icon = "check" if change["new"] else ""

    button.observe(mark, "value")
    return button


def _check_range(argument: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ResnetPathsError(argument, value, f"a number from {low} to {high}")

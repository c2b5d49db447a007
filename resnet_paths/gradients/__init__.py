"""The gradient by path length: exactly over all 2^n paths, and as Veit et al. 2016 sampled it.

Four quantities must be distinguished. For the paths of length k, whose gradients are g_S and sum to G_k, and the whole
gradient G:

- ``summed_path_gradient_norm``, the norm of G_k, and ``gradient_share``, <G_k, G> / <G, G>, which sums to 1 and may be
  negative: method ``"exact"``, one backward pass of n (n + 1) / 2 block VJPs;
- ``rms_path_gradient_norm``, the root of the mean over paths of |g_S|^2, and ``coherence``, |G_k| over the root of the
  sum of |g_S|^2 (1 if the paths are orthogonal): method ``"energy"``;
- ``mean_path_gradient_norm``, the mean over paths of |g_S|, the paper's figure 6b, and ``total_gradient_magnitude``,
  num_paths times that, its figure 6c: method ``"sampled"``. ``uncancelled_share`` is |G_k| over the total magnitude.

The last two are estimates. A few paths hold most of the gradient, so that paths are drawn in proportion to what they
are expected to carry and weighted: in populations that split at every block (`resnet_paths.gradients.populations`), or
where all examples take the same paths by conditional Poisson sampling (`resnet_paths.gradients.weighted`). The paper's
protocol (section 4.3) draws them uniformly: ``paths="uniform"``. With a random sign on every branch the expectation of
|G_k|^2 is the sum of |g_S|^2 as well (Parseval's identity): ``paths="signs"``.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import torch

from resnet_paths._utils.arguments import require_int
from resnet_paths._utils.errors import ResnetPathsError, nearest_names
from resnet_paths._utils.statistics import mean_over_examples
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import Inputs, InputsOrLoader, batches_with_bar
from resnet_paths.core.paths import lengths_up_to, path_polynomial
from resnet_paths.gradients.coherence import null_coherence
from resnet_paths.gradients.effective import (
    PAPER_WINDOW,
    EffectiveWindow,
    GeometricDecay,
    decay_factors,
    effective_window,
    fit_decay,
)
from resnet_paths.gradients.estimates import (
    Draws,
    Points,
    measure_exactly,
    measure_uniform,
    measure_weighted,
    rows_at_once,
)
from resnet_paths.gradients.independence import (
    BlockIndependence,
    block_independence,
    branch_probabilities,
    pair_covariances,
    poisson_binomial,
)
from resnet_paths.gradients.losses import Loss
from resnet_paths.gradients.measurements import Measurements
from resnet_paths.gradients.moments import PathLengthMoments, path_length_moments
from resnet_paths.gradients.points import Place, Point, num_block_vjps
from resnet_paths.gradients.populations import measure_populations
from resnet_paths.gradients.scalar import scalar_gradients

__all__ = [
    "PAPER_WINDOW",
    "BlockIndependence",
    "EffectiveWindow",
    "GeometricDecay",
    "PathLengthMoments",
    "block_independence",
    "branch_probabilities",
    "decay_factors",
    "effective_window",
    "fit_decay",
    "gradient_by_depth",
    "gradient_by_path_length",
    "gradient_by_stage_lengths",
    "gradient_through_block",
    "null_coherence",
    "pair_covariances",
    "path_length_moments",
    "poisson_binomial",
    "scalar_gradients",
]

_PATHS = {"exact": (None,), "energy": ("weighted", "signs"), "sampled": ("weighted", "uniform")}
_FEW = 10


@torch.inference_mode(False)
def gradient_by_path_length(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: object = None,
    *,
    method: str = "exact",
    loss: Loss | None = None,
    max_length: int | None = None,
    with_respect_to: str | int | tuple[str, str | int] = "input",
    per_example: bool = True,
    paths: str | None = None,
    num_draws: int | None = None,
    relative_error: float = 0.1,
    average: str = "mean",
    generator: torch.Generator | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The gradient of the loss, split by the number of residual branches that it passes through.

    The module docstring of `resnet_paths.gradients` defines the four quantities. The gradient with respect to what a
    branch reads of the context counts among the paths that take that branch last. Each example has its own loss and
    its own gradient; norms and shares are computed for each, then averaged. All batches of a loader count as one set of
    examples.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch, as the chain is called: a tensor, a tuple of positional arguments or a mapping of keyword
            arguments; or a loader of (inputs, targets) with inputs of any such form, or of mappings. ``labels`` in a
            mapping, as in those of Hugging Face, are its targets, unless `targets` are given.
        targets: What `loss` takes in addition to the logits; None with a loader. For the default loss, class indices
            [batch] or class probabilities [batch, class].
        method: ``"exact"``, ``"energy"`` (which includes the columns of ``"exact"``) or ``"sampled"``.
        loss: From (logits, targets) to a loss for each example, [batch]; cross-entropy if None.
        max_length: The longest paths of interest: longer ones are not computed. None for all.
        with_respect_to: ``"input"``; ``"stem"``, the output of the stem, with the context that depends on floating
            inputs; position or name of a block, for its output; or ``("parameters", block)``, for all parameters of a
            block, by the length of the path above it.
        per_example: Whether the norm is that of an example's gradient. If not, a batch counts as one measurement: the
            norm is that of the gradient of the batch's mean loss, and standard errors are over batches.
        paths: What is drawn: ``"weighted"`` paths; for ``"sampled"`` also ``"uniform"``, the paper's protocol; for
            ``"energy"`` also ``"signs"``, a random sign on every branch. None for weighted paths, and uniform ones for
            ``average="log-mean"``. Each example has its own weighted paths; of uniform ones, and where `per_example` is
            False, all examples of a batch take the same.
        num_draws: Number of draws. What a draw is, and the default, depends on `paths`:

            - ``"weighted"``: paths that are carried from block to block together, a population for all lengths; there
              are four populations or more, so that their errors have 60 degrees of freedom. By default each
              population has 128 paths, with more than four examples 512 divided by their number, but at least 64; and
              populations are drawn until `relative_error` is reached, 100 at most. Lengths with no more paths than a
              population are measured exactly, by default also those for which this takes few block VJPs compared with
              the populations;
            - ``"weighted"`` where `per_example` is False: paths of each length. By default 128 to 5000 of them, or all
              where there are at most 256;
            - ``"uniform"``: paths of each length, 20 by default;
            - ``"signs"``: random signs on all branches, by default until `relative_error` is reached, 1000 at most.
        relative_error: The relative standard error due to the draws at which to stop: of ``mean_path_gradient_norm``
            and of the square of ``rms_path_gradient_norm`` for weighted paths, of ``rms_path_gradient_norm`` for signs.
            It is reached at every length that holds at least a thousandth of the sum over lengths; the stated errors of
            other lengths are rough. Where paths are nearly all alike (coherence of hundreds and more) few draws of
            signs show too little of the spread: the energy is too low, with too small an error.
        average: For ``"sampled"``: ``"mean"``, or ``"log-mean"`` for the geometric mean of the norms.
        generator: Source of the random numbers; None for a new one, seeded with 0.
        memory_budget: Bytes that stacks of cotangents and kept activations may take; batches are split to fit.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        One row per path length, with ``path_length``, ``num_paths`` (an exact int), ``underflowed`` (whether a norm
        that is not 0, or with signs its square, was too small for a float64) and the columns of the method (what is too
        large for a float64 is infinite, and so are means over it):

        - ``"exact"``: ``summed_path_gradient_norm`` and ``gradient_share``;
        - ``"energy"`` with ``paths="signs"``: these, ``rms_path_gradient_norm`` and ``coherence``;
        - ``"sampled"`` with ``paths="uniform"``: ``mean_path_gradient_norm`` and ``total_gradient_magnitude``;
        - ``"sampled"`` with weighted paths: these and ``rms_path_gradient_norm``;
        - ``"energy"`` with weighted paths: all of the above and ``uncancelled_share``.

        Each has a standard error ``..._se``. For the columns of ``"exact"`` it is over examples (NaN for a single one);
        for estimates it is the error due to the draws, for these examples, and ``..._examples_se`` is the error due to
        draws and examples (not for ``uncancelled_share``). Weighted paths also give 95 % intervals due to the draws,
        ``..._low`` and ``..._high``; ``num_draws``, the number of sampled paths of this length per example; and
        ``effective_sample_size``, the number of draws with equal contributions that would have the same error (with a
        warning where it is below 10). The page "Coverage of the intervals" of the documentation states how often the
        intervals contain the true value.

        ``attrs`` hold ``method``, ``paths``, ``with_respect_to``, ``per_example``, ``num_examples``, ``num_draws``,
        ``num_block_vjps`` (per example; the whole gradient, to which shares refer, takes one more per block),
        ``omitted_share`` (the share of the gradient on paths longer than `max_length`; None for ``"sampled"``),
        ``num_without_gradient`` (the number of examples whose gradient is 0: they have no shares), and, over all
        lengths, ``longest_path`` and ``total_num_paths``.

    Raises:
        ResnetPathsError: If the chain is in training mode, the method, place or length is unknown, the inputs are of
            no such form, or integers (take ``with_respect_to="stem"``, the embedding), the loss is not one number per
            example, or an activation is not finite (naming the first block).

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(4)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.constant_(layer.weight, 0.1)
        >>> blocks = [Block(layer, torch.nn.Identity(), name=f"block{i}") for i, layer in enumerate(layers)]
        >>> chain = ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity())
        >>> frame = gradient_by_path_length(chain, torch.ones(2, 3), loss=lambda y, _: y.sum(1))
        >>> frame.gradient_share.round(4).tolist()  # a binomial with odds 0.3
        [0.3501, 0.4202, 0.1891, 0.0378, 0.0028]
    """
    place = Place.of(chain, with_respect_to)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    paths = _checked_options(method, paths, average)
    draws = Draws.of(num_draws, relative_error, generator)
    if not per_example and place.of_parameters:
        raise ResnetPathsError("per_example", per_example, "True for gradients of parameters")
    counts = path_polynomial(place.above)
    lengths = lengths_up_to(counts, max_length)
    all_measured = []
    for batch_inputs, batch_targets in batches_with_bar("gradient", inputs, targets, progress):

        def points(rows: int, batch: Inputs = batch_inputs, truth: object = batch_targets) -> Iterator[Point]:
            return place.points(batch, truth, loss, memory_budget, rows)

        some = {k: counts[k] for k in lengths}
        measured = _measure(place, points, some, draws, method, paths, per_example=per_example)
        all_measured.append(measured if per_example else measured.of_batch())
    whole = Measurements.joined(all_measured)
    frame = pd.DataFrame({
        "path_length": lengths,
        "num_paths": pd.Series([counts[k] for k in lengths], dtype=object),
    })
    for name, column in whole.columns([counts[k] for k in lengths], average).items():
        frame[name] = column
    if paths == "weighted":
        _warn_of_few_paths(frame)
    vjps = 0 if method == "sampled" else num_block_vjps(place.above.path_choices, lengths[-1])
    frame.attrs |= {
        "method": method,
        "paths": paths,
        "with_respect_to": with_respect_to,
        "per_example": per_example,
        "num_examples": whole.num_examples,
        "num_draws": whole.num_draws,
        "num_block_vjps": vjps * (1 + whole.num_draws if paths == "signs" else 1) + whole.num_path_vjps,
        "longest_path": len(counts) - 1,
        "total_num_paths": sum(counts),
        "omitted_share": whole.omitted_share,
        "num_without_gradient": whole.num_without_gradient,
    }
    return frame


@torch.inference_mode(False)
def gradient_by_stage_lengths(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: object = None,
    *,
    loss: Loss | None = None,
    with_respect_to: str | int = "input",
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The gradient split by the length of the path in every stage: the joint distribution, exactly.

    The cost is that of `gradient_by_path_length` times about the number of combinations of lengths in the later stages,
    so that it is meant for tens of examples.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `gradient_by_path_length`.
        targets: What `loss` takes in addition to the logits.
        loss: From (logits, targets) to a loss for each example; cross-entropy if None.
        with_respect_to: ``"input"``, ``"stem"``, or a block, for its output.
        memory_budget: Bytes that stacks of cotangents may take.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        One row per combination of lengths: ``path_length_stage0`` and so on; ``num_paths``, exact;
        ``summed_path_gradient_norm`` and ``gradient_share`` with standard errors over examples, ``..._se``.

    Raises:
        ResnetPathsError: As `gradient_by_path_length`.
    """
    place = Place.of_states(chain, with_respect_to)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    indices = range(place.down_to, len(chain))
    stages = [list(run) for _, run in itertools.groupby(indices, key=lambda i: chain[i].stage)]
    ranges = [range(run[0], run[-1] + 1) for run in stages]
    polynomials = [path_polynomial(chain.with_blocks(list(chain)[r.start : r.stop])) for r in ranges]
    keys = sorted(itertools.product(*([k for k, count in enumerate(p) if count] for p in polynomials)))
    row_of = {key: row for row, key in enumerate(keys)}
    all_measured = []
    for batch_inputs, batch_targets in batches_with_bar("gradient by stage", inputs, targets, progress):
        for point in place.points(batch_inputs, batch_targets, loss, memory_budget // 4, len(chain) + 1):
            norms, shares = np.zeros((2, len(keys), point.num_examples))
            underflowed = np.zeros(len(keys), dtype=bool)
            for key, stack in point.by_stage_lengths(ranges, memory_budget // 2):
                if key in row_of:
                    found, lost = point.norms(stack)
                    norms[row_of[key]], underflowed[row_of[key]] = found[0, 0], lost.any()
                    shares[row_of[key]] = point.shares(stack, point.whole)[0]
            all_measured.append(
                Measurements(point.num_examples, underflowed, norms, shares, point.norms(point.whole)[0][0, 0])
            )
    counts = [math.prod(p[k] for p, k in zip(polynomials, key, strict=True)) for key in keys]
    names = [f"path_length_stage{chain[r.start].stage}" for r in ranges]
    if len(set(names)) < len(names):  # stages that were moved about
        names = [f"path_length_stage{s}" for s in range(len(ranges))]
    frame = pd.DataFrame({name: [key[s] for key in keys] for s, name in enumerate(names)})
    frame["num_paths"] = pd.Series(counts, dtype=object)
    for name, column in Measurements.joined(all_measured).columns(counts, "mean").items():
        frame[name] = column
    return frame


@torch.inference_mode(False)
def gradient_through_block(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: object = None,
    *,
    loss: Loss | None = None,
    with_respect_to: str | int = "input",
    norms: bool = False,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The share of the gradient that passes through each block's branch.

    With G the whole gradient and G_i the sum over all paths that take the branch of block i, the share is
    <G_i, G> / <G, G>. A path of length k passes k branches: where no branch holds a chain of its own, the shares add
    up to the sum over lengths of k times ``gradient_share``, the mean path length as the gradient weighs it. All shares
    take one backward pass and one forward pass of tangents; the norms of G_i take n (n + 1) / 2 block VJPs.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `gradient_by_path_length`.
        targets: What `loss` takes in addition to the logits.
        loss: From (logits, targets) to a loss for each example; cross-entropy if None.
        with_respect_to: ``"input"``, ``"stem"``, or a block, for its output.
        norms: Whether to compute the norms of G_i as well.
        memory_budget: Bytes that stacks of cotangents may take.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        One row per block above the place, first to last: ``block_index``, ``block`` (name), ``stage``;
        ``gradient_share_through_branch``, the mean over examples, with its standard error ``..._se``;
        with `norms` also ``path_gradient_norm_through_branch``, the norm of G_i, likewise.

    Raises:
        ResnetPathsError: As `gradient_by_path_length`.
    """
    place = Place.of_states(chain, with_respect_to)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    found: dict[str, list[np.ndarray]] = {"gradient_share": [], **({"path_gradient_norm": []} if norms else {})}
    rows = len(chain) + 1 if norms else 1
    for batch_inputs, batch_targets in batches_with_bar("gradient through blocks", inputs, targets, progress):
        for point in place.points(batch_inputs, batch_targets, loss, memory_budget, rows):
            if norms:
                stack = point.through_branches()
                found["path_gradient_norm"].append(point.norms(stack)[0][:0:-1, 0])
                found["gradient_share"].append(point.shares(stack, stack.rows(0, 1))[:0:-1])
            else:
                found["gradient_share"].append(point.shares_through_branches())
    indices = range(place.down_to, len(chain))
    frame = pd.DataFrame({
        "block_index": indices,
        "block": [chain[i].name for i in indices],
        "stage": [chain[i].stage for i in indices],
    })
    for name, values in found.items():
        mean, error = mean_over_examples(np.concatenate(values, 1))
        frame[f"{name}_through_branch"], frame[f"{name}_through_branch_se"] = mean, error
    return frame


@torch.inference_mode(False)
def gradient_by_depth(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: object = None,
    *,
    loss: Loss | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The norm of the gradient with respect to the input of each block, from one backward pass.

    Each example has its own loss and its own gradient. BatchNorm is that of eval mode: its statistics are constants,
    through which no gradient flows. An untrained network needs statistics first, or nothing is normalised:
    `torch.optim.swa_utils.update_bn` computes them from images.

    Args:
        chain: The chain, in eval mode, with or without skips.
        inputs: A batch or a loader, as for `gradient_by_path_length`.
        targets: What `loss` takes in addition to the logits.
        loss: From (logits, targets) to a loss for each example; cross-entropy if None.
        memory_budget: Bytes that kept activations may take; batches are split to fit.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        One row per depth: ``depth``, the number of blocks before the state, from 0 (output of the stem) to n (output of
        the last block); ``block`` (name of the block that reads this state; ``"head"`` for the last row), ``stage`` (of
        that block; <NA> for the head); ``gradient_norm``, the mean over examples, with its standard error
        ``gradient_norm_se``.

    Raises:
        ResnetPathsError: As `gradient_by_path_length`.
    """
    place = Place.of(chain, "stem")
    memory_budget = require_int("memory_budget", memory_budget, 1)
    all_measured = []
    for batch_inputs, batch_targets in batches_with_bar("gradient by depth", inputs, targets, progress):
        for point in place.points(batch_inputs, batch_targets, loss, memory_budget, 1):
            norms = [point.norms(stack)[0][0, 0] for stack in point.by_depth()]
            all_measured.append(np.stack(norms[::-1]))
    mean, error = mean_over_examples(np.concatenate(all_measured, 1))
    return pd.DataFrame({
        "depth": range(len(chain) + 1),
        "block": [*(block.name for block in chain), "head"],
        "stage": pd.array([*(block.stage for block in chain), None], dtype="Int64"),
        "gradient_norm": mean,
        "gradient_norm_se": error,
    })


def _measure(
    place: Place,
    points: Points,
    counts: Mapping[int, int],
    draws: Draws,
    method: str,
    paths: str | None,
    *,
    per_example: bool,
) -> Measurements:
    """One batch by a method."""
    lengths, parts = list(counts), []
    if method != "sampled":
        signs = draws if paths == "signs" else None
        parts.append(
            Measurements.joined([measure_exactly(p, lengths, signs) for p in points(rows_at_once(lengths, signs))])
        )
    if paths == "uniform":
        parts.append(measure_uniform(place, points, lengths, draws))
    if paths == "weighted":
        # The norm of a whole batch is that of the same path in all examples.
        measure = measure_populations if per_example else measure_weighted
        parts.append(measure(place, points, counts, draws))
    return functools.reduce(Measurements.beside, parts)


def _checked_options(method: str, paths: str | None, average: str) -> str | None:
    """What is drawn, once all options are known to be allowed."""
    if not isinstance(method, str) or method not in _PATHS:
        raise ResnetPathsError("method", method, f"one of {nearest_names(str(method), _PATHS, cutoff=0)}")
    if average not in ("mean", "log-mean"):
        raise ResnetPathsError("average", average, "'mean' or 'log-mean'")
    allowed = _PATHS[method]
    if method == "sampled" and average == "log-mean":
        allowed = ("uniform",)  # the logarithms of norms vary far less than the weights
    if paths is not None and paths not in allowed:
        names = " or ".join(map(repr, allowed))
        raise ResnetPathsError("paths", paths, f"{names} for method={method!r} and average={average!r}")
    return allowed[0] if paths is None else paths


def _warn_of_few_paths(frame: pd.DataFrame) -> None:
    """Say where the estimates of lengths that count rest on a few paths."""
    totals = frame["total_gradient_magnitude"]
    few = frame[
        (frame["effective_sample_size"] < _FEW)
        & (frame["mean_path_gradient_norm_se"] > 0)
        & (totals >= totals.sum() / 1000)
    ]
    if len(few):
        warnings.warn(
            f"At path lengths {few.path_length.tolist()} the effective sample size is below {_FEW}: errors and "
            f"intervals there are too small. Take a larger num_draws, or num_draws=None and a smaller relative_error.",
            stacklevel=4,
        )

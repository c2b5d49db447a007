"""Scores that predict the effect of a deletion without deleting anything, and their correlations with measured effects.

One forward pass gives for every block or range of blocks: block influence, angular distance, and the norm of what the
branches add relative to that of the state without them. One backward pass for each measure gives the increase of the
measure to first order. Rank correlations with the measured effects show which of these scores can be relied on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm.auto import tqdm

from resnet_paths._utils.arguments import require_frame, require_int
from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import mean_over_items
from resnet_paths._utils.threads import refuse_fork_after_autograd
from resnet_paths.core.chain import Block, ResidualChain, require_chain
from resnet_paths.core.inputs import (
    Inputs,
    each_tensor,
    num_examples,
    refusing_other_dtypes,
    require_loader,
    require_movable,
    unpack,
    unpack_optional,
)
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.parts import call_part
from resnet_paths.core.placement import device_of, place_modules
from resnet_paths.core.positions import Tokens, counted_positions, validate_tokens, vectors_of
from resnet_paths.core.signature import arguments_of
from resnet_paths.lesions.frames import deletions_of
from resnet_paths.lesions.measures import Measure, measures_of
from resnet_paths.lesions.runner import counts_of_items, shifted
from resnet_paths.lesions.validation import validate_outputs

__all__ = ["SCORES", "predicted_effects", "score_correlations"]

SCORES = ("block_influence", "angular_distance", "relative_branch_norm")
"""Columns of `predicted_effects` that need no labels."""
_FIRST_ORDER = re.compile(r"first_order_\w+_increase")


@torch.inference_mode(False)
def predicted_effects(
    chain: ResidualChain,
    loader: Iterable[object],
    *,
    measures: Sequence[str | Measure | Callable[..., object]] = ("cross_entropy",),
    shift_labels: bool = False,
    span: int | Iterable[int] = 1,
    tokens: Tokens = None,
    feature_dim: int | None = None,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Cheap scores of every block or range of blocks; nothing is deleted.

    They cost one forward pass per batch, and one backward pass for each measure. Let T be what the last block of a
    range adds up and S what would be there without the branches of the range: skip(h), or h itself in a plain block
    that keeps the shape. Each mean is followed by its standard error ``..._se``, with examples as clusters:

    ==============================  ================================================================================
    ``first_order_m_increase``      of each measure m, the sum of <dm/dT, S - T> over the blocks of the range, each at
                                    its own T and S; gradient times branch output. Of the cross-entropy it is the
                                    *first-order loss*
    ``block_influence``             1 - cos(post(S), post(T)) (ShortGPT, Men et al. 2024, equation 1)
    ``angular_distance``            arccos(cos(post(S), post(T))) / pi (Gromov et al. 2024, equation 4)
    ``relative_branch_norm``        norm of T - S over norm of S (Jastrzebski et al. 2018, section 4)
    ==============================  ================================================================================

    The cosine of two states that are 0 is taken as 1, and if only one is, as 0. With identity skips post(S) is the
    state before the range. As published, the scores of language models are those of whole layers
    (`resnet_paths.group_blocks`), block influence with ``tokens="all"``, and angular distance with ``tokens="last"``
    and a `span` of several layers.

    Args:
        chain: The intact chain, in eval mode.
        loader: Batches as for `resnet_paths.lesion_study`.
        measures: Names and functions as for `resnet_paths.lesion_study`, of those that are differentiable, such as
            ``"cross_entropy"``, ``"margin"`` or ``"mean_squared_error"``. None of them, ``()``, for batches without
            labels.
        shift_labels: As for `resnet_paths.lesion_study`.
        span: Number of blocks in a range, or several such numbers.
        tokens: Which tokens of states [batch, token, feature] cosines and norms are taken of: ``"all"``, ``"last"``, a
            mask [token] or [batch, token], or a function from the inputs of a batch to such a mask; means are over all
            tokens of all examples. None takes whole examples, see `feature_dim`. Tokens where a mapping's
            ``"attention_mask"`` [batch, token] is 0 do not count.
        feature_dim: Dimension of the state over which cosines and norms are taken, averaged over all others; None
            takes an example's state as one vector, or, with `tokens`, the last dimension.
        device: As for `resnet_paths.lesion_study`.
        progress: Whether to show a bar over batches.

    Returns:
        One row per range: ``block_index`` and ``block``, position and name of its first block, ``blocks`` (tuple of
        positions), ``num_blocks``, the scores and their standard errors (NaN where a block of the range cannot be
        deleted), ``num_examples``.

    Raises:
        ResnetPathsError: If the chain is in training mode, the loader is empty or does not give such batches, labels
            are out of range, a measure has no gradient, no range has `span` blocks, or states have no dimension
            `feature_dim` or no tokens.
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    require_loader(loader)
    feature_dim = None if feature_dim is None else require_int("feature_dim", feature_dim)
    validate_tokens(tokens, feature_dim)
    spans = _checked_spans(span, len(chain))
    scored = _Scored(_differentiable(measures), shift_labels, spans, tokens, feature_dim)
    needs_labels = shift_labels or any(measure.reads for measure in scored.measures)
    (placed,) = place_modules([chain], device=device)
    of_batches = []
    for batch in tqdm(loader, desc="predicted effects", unit="batch", disable=not progress):
        # Copies: autograd cannot work with tensors of inference mode, and a stem written by hand may work in place.
        read = (unpack if needs_labels else unpack_optional)(batch)
        require_movable("loader", read, device_of(placed))
        inputs, labels = each_tensor(lambda t: t.to(device_of(placed), copy=True), read)
        if num_examples(inputs):
            of_batches.append(_of_batch(placed, inputs, labels, scored))
    if not of_batches:
        raise ResnetPathsError("loader", "no batches", "a loader of at least one batch")
    return _frame(chain, scored, of_batches)


def score_correlations(predicted: pd.DataFrame, study: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations of the scores with the measured effects of the deletions.

    Args:
        predicted: From `predicted_effects`, of one span.
        study: From `resnet_paths.lesion_study`, with the deletions of these ranges among its rows, such as
            `resnet_paths.single_deletions` or `resnet_paths.range_deletions`; others are left out.

    Returns:
        One row per score and effect (``error_rate_increase``, ``cross_entropy``): ``spearman`` and ``kendall``, rank
        correlations over blocks or ranges, with ``spearman_p`` and ``kendall_p``, two-sided p-values against no
        correlation; ``spearman_low`` and ``spearman_high``, the 95 % interval of Bonett and Wright (2000), NaN for
        three blocks and for a correlation of 1 or -1; ``num_blocks``, the number of blocks or ranges.

    Raises:
        ResnetPathsError: If a frame is of another kind, the rows of `study` are those of two studies, or fewer than
            three blocks are in both frames.
    """
    require_frame("predicted", predicted)
    require_frame("study", study)
    scores = [name for name in predicted if name in SCORES or _FIRST_ORDER.fullmatch(str(name))]
    if not set(SCORES) <= set(scores) or "blocks" not in predicted:
        raise ResnetPathsError("predicted", list(predicted.columns), "a frame of predicted_effects")
    spans = predicted["num_blocks"].unique().tolist()
    if len(spans) != 1:
        raise ResnetPathsError("predicted", f"ranges of {spans} blocks", "the rows of one span")
    effects = ("error_rate_increase", "cross_entropy")
    deleted = deletions_of("study", study, spans[0], effects)[["blocks", *effects]]
    both = predicted.dropna(subset=scores).merge(deleted, on="blocks", validate="one_to_one")
    if len(both) < 3:
        what = "single deletions" if spans[0] == 1 else f"deletions of {spans[0]} blocks in a row"
        plan = "single_deletions(chain)" if spans[0] == 1 else f"range_deletions(chain, [{spans[0]}])"
        raise ResnetPathsError("study", f"{len(both)} {what} in both frames", "at least three", f"Study {plan}.")
    rows = []
    for score in scores:
        for effect in effects:
            spearman, kendall = stats.spearmanr(both[score], both[effect]), stats.kendalltau(both[score], both[effect])
            low, high = _interval_of_correlation(float(spearman.statistic), len(both))
            rows.append({
                "score": score,
                "effect": effect,
                "spearman": float(spearman.statistic),
                "spearman_low": low,
                "spearman_high": high,
                "spearman_p": float(spearman.pvalue),
                "kendall": float(kendall.statistic),
                "kendall_p": float(kendall.pvalue),
                "num_blocks": len(both),
            })
    return pd.DataFrame(rows)


def _interval_of_correlation(spearman: float, num: int) -> tuple[float, float]:
    """95 % interval of a rank correlation by Fisher's transformation (Bonett and Wright 2000, equation 4)."""
    if num < 4 or not abs(spearman) < 1:
        return math.nan, math.nan
    half = float(stats.norm.ppf(0.975)) * math.sqrt((1 + spearman**2 / 2) / (num - 3))
    return math.tanh(math.atanh(spearman) - half), math.tanh(math.atanh(spearman) + half)


@dataclass(frozen=True)
class _Scored:
    """What is scored: arguments of `predicted_effects` after validation."""

    measures: tuple[Measure, ...]
    shift_labels: bool
    spans: tuple[int, ...]
    tokens: Tokens
    feature_dim: int | None

    @property
    def dim(self) -> int | None:
        """The dimension of the features of a state; None for one vector of all numbers of an example."""
        return -1 if self.feature_dim is None and self.tokens is not None else self.feature_dim


@dataclass(frozen=True)
class _BatchScores:
    """What the examples of a batch add up.

    Attributes:
        scores: Sums over the vectors of each example, and their number, [range, score, 2, example].
        sums: Sums of each measure, [example, sum].
        changes: Change of the first of them to first order, of each measure, [block, example].
    """

    scores: np.ndarray
    sums: list[np.ndarray]
    changes: list[np.ndarray]


def _checked_spans(span: object, num_blocks: int) -> tuple[int, ...]:
    given = tuple(span) if isinstance(span, Iterable) and not isinstance(span, str) else (span,)
    for one in given:
        if isinstance(one, bool) or not hasattr(one, "__index__") or not 1 <= one.__index__() <= num_blocks:
            raise ResnetPathsError("span", one, f"numbers of blocks from 1 to {num_blocks}")
    if not given or len(set(given)) < len(given):
        raise ResnetPathsError("span", given, "at least one number of blocks, each once")
    return given


def _differentiable(measures: object) -> tuple[Measure, ...]:
    found = measures_of(measures) if not isinstance(measures, Sequence) or len(measures) else ()  # type: ignore[arg-type]
    for measure in found:
        if measure.is_rate or measure.statistic == "kl_divergence":
            why = "A rate has no gradient." if measure.is_rate else "At the intact chain its gradient is 0."
            raise ResnetPathsError("measures", measure.name, "measures with a gradient, such as 'cross_entropy'", why)
    return found


def _of_batch(chain: ResidualChain, inputs: Inputs, labels: torch.Tensor | None, scored: _Scored) -> _BatchScores:
    refuse_fork_after_autograd()
    args, kwargs = arguments_of(inputs)
    with torch.no_grad():
        start, context = chain.begin(*args, **kwargs)
    with torch.set_grad_enabled(bool(scored.measures)):
        # From the first state on, which requires gradients even where no parameter does.
        start = start.requires_grad_(start.is_floating_point() and bool(scored.measures))
        with refusing_other_dtypes(inputs, "chain", chain):
            states, totals = _states(chain, start, context)
            outputs = call_part(chain.head, states[-1] if chain.eval_only else states[-1].clone(), context)
        labels = shifted(labels) if scored.shift_labels and labels is not None else labels
        validate_outputs(scored.measures, outputs, labels)
        counts = counts_of_items(inputs, labels, scored.shift_labels)
        all_sums = [measure.sums(outputs, labels, outputs.detach(), counts) for measure in scored.measures]
        sums, gradients = _gradients(scored.measures, all_sums, totals)
    positions = counted_positions(inputs, scored.tokens, states)
    found: dict[tuple[int, int], torch.Tensor] = {}
    changes: list[torch.Tensor] = []
    for first in range(len(chain)):
        left: torch.Tensor | None = states[first].detach()
        for span in range(1, min(max(scored.spans), len(chain) - first) + 1):
            last = chain[first + span - 1]
            alone = None if left is None else _without_branch(last, left, context)
            if span == 1:
                changes.append(_changes(alone, totals[first], [of_measure[first] for of_measure in gradients]))
            if span in scored.spans:
                pair = totals[first + span - 1].detach(), states[first + span].detach()
                found[span, first] = _scores(last, alone, *pair, context, positions, scored.dim).cpu()
            left = None if alone is None else _after(last, alone, context)
    rows = [found[span, first] for span in scored.spans for first in range(len(chain) - span + 1)]
    return _BatchScores(torch.stack(rows).numpy(), sums, list(torch.stack(changes, 1).numpy()))


def _states(
    chain: ResidualChain, start: torch.Tensor, context: Mapping[str, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What each block reads, and what the last returns; what each block adds up."""
    # Parts written by hand may work in place; exported ones do not.
    own = torch.Tensor.clone if not chain.eval_only else lambda tensor: tensor
    states, totals = [start], []
    for block in chain:
        total = block.added_up(own(call_part(block.pre, own(states[-1]), context)), context)
        if torch.is_grad_enabled() and not total.requires_grad:
            total = total.detach().requires_grad_()
        totals.append(total)
        states.append(call_part(block.post, own(total), context))
    return states, totals


def _gradients(
    measures: Sequence[Measure], sums_of_each: Sequence[torch.Tensor], totals: list[torch.Tensor]
) -> tuple[list[np.ndarray], list[tuple[torch.Tensor, ...]]]:
    """The sums of each measure, and gradients of the first, the one that depends on the outputs smoothly."""
    all_sums, gradients = [], []
    for measure, sums in zip(measures, sums_of_each, strict=True):
        if not sums.requires_grad:
            raise ResnetPathsError("measures", measure.name, "measures with a gradient, such as 'cross_entropy'")
        gradients.append(torch.autograd.grad(sums[:, 0].sum(), totals, retain_graph=True, materialize_grads=True))
        all_sums.append(sums.detach().cpu().double().numpy())
    return all_sums, gradients


@torch.no_grad()
def _changes(alone: torch.Tensor | None, total: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """<gradient, S - T> of each measure and example, [measure, example]; NaN if the block cannot be deleted."""
    if alone is None:
        return torch.full((len(gradients), len(total)), math.nan, dtype=torch.float64)
    difference = wide(alone - total)
    each = [(wide(gradient) * difference).flatten(1).sum(1) for gradient in gradients]
    return torch.stack(each).cpu() if each else torch.empty(0, len(total), dtype=torch.float64)


@torch.no_grad()
def _without_branch(block: Block, state: torch.Tensor, context: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What a block would add up without its branch, which may work in place; None if it cannot do without."""
    shared = call_part(block.pre, state.clone(), context)
    if block.skip is not None:
        return call_part(block.skip, shared, context)
    return shared if block.keeps_shape else None


@torch.no_grad()
def _after(block: Block, total: torch.Tensor, context: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return call_part(block.post, total.clone(), context)


@torch.no_grad()
def _scores(
    block: Block,
    alone: torch.Tensor | None,
    total: torch.Tensor,
    state: torch.Tensor,
    context: Mapping[str, torch.Tensor],
    positions: torch.Tensor | None,
    dim: int | None,
) -> torch.Tensor:
    """Of a range that ends with a block: sums of the scores of each example's vectors, [score, 2, example]."""
    _refuse_other_dim(dim, total.dim())
    if alone is None:
        return torch.zeros(len(SCORES), 2, len(total), dtype=torch.float64)
    one, counts = vectors_of(wide(_after(block, alone, context)), dim, positions)
    other, _ = vectors_of(wide(state), dim, positions)
    cosine = (_unit(one) * _unit(other)).sum(-1).clamp(-1, 1)
    cosine[(one == 0).all(-1) & (other == 0).all(-1)] = 1  # nothing changed
    vectors, of_sums = zip(*(vectors_of(wide(s), dim, positions) for s in (total - alone, alone)), strict=True)
    changed, left = (v.norm(dim=-1) for v in vectors)
    norm = torch.where(changed == 0, 0.0, changed / left)
    return torch.stack([
        torch.stack([torch.where(where, value, 0).sum(1), where.sum(1).to(value)])
        for value, where in ((1 - cosine, counts), (cosine.acos() / math.pi, counts), (norm, of_sums[0]))
    ])


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of norm 1 in the same directions, however small they are; 0 for those that are 0."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, vectors / norm)


def _refuse_other_dim(dim: int | None, rank: int) -> None:
    if dim is not None and (not -rank <= dim < rank or dim % rank == 0):
        raise ResnetPathsError(
            "feature_dim", dim, f"None, or a dimension of the states, from 1 to {rank - 1} or from the end"
        )


def _frame(chain: ResidualChain, scored: _Scored, of_batches: Sequence[_BatchScores]) -> pd.DataFrame:
    ranges = [range(first, first + span) for span in scored.spans for first in range(len(chain) - span + 1)]
    columns: dict[str, object] = {
        "block_index": [blocks[0] for blocks in ranges],
        "block": [chain[blocks[0]].name or str(blocks[0]) for blocks in ranges],
        "blocks": [tuple(blocks) for blocks in ranges],
        "num_blocks": [len(blocks) for blocks in ranges],
    }
    for number, measure in enumerate(scored.measures):
        sums = np.concatenate([batch.sums[number] for batch in of_batches])
        of_blocks = np.concatenate([batch.changes[number] for batch in of_batches], 1)
        found = [_first_order(measure, sums, of_blocks[blocks.start : blocks.stop].sum(0)) for blocks in ranges]
        name = f"first_order_{measure.name}_increase"
        columns[name], columns[f"{name}_se"] = zip(*found, strict=True)
    scores = np.concatenate([batch.scores for batch in of_batches], 3)
    for number, name in enumerate(SCORES):
        columns[name], columns[f"{name}_se"] = mean_over_items(scores[:, number, 0], scores[:, number, 1])
    return pd.DataFrame(columns | {"num_examples": scores.shape[3]})


def _first_order(measure: Measure, sums: np.ndarray, changes: np.ndarray) -> tuple[float, float]:
    """The change of a measure, a function of sums over examples, with the first sum; and its standard error."""
    of_examples = torch.from_numpy(np.column_stack([sums, changes]))
    with torch.enable_grad():
        total = of_examples.sum(0).requires_grad_()
        value = measure.value(total[:-1])
        value = value if measure.link is None else measure.link(value)
        (slopes,) = torch.autograd.grad(value, total, create_graph=True)
        change = slopes[0] * total[-1]
        # It stays the same where all sums are multiplied by one factor: these influences sum up to 0.
        (gradient,) = torch.autograd.grad(change, total)
    influences = (of_examples @ gradient).numpy()[(sums != 0).any(1)]
    num = len(influences)
    error = math.sqrt((influences**2).sum() * num / (num - 1)) if num > 1 else math.nan
    return change.item(), error

"""What cheap scores say of a block's deletion, without deleting it; and what they are worth.

From one forward and one backward pass come, for every block at once: the first-order estimate of the loss, block
influence, angular distance, and the branch's norm beside the skip's. Beside the measured effects their rank
correlations show which of them can be relied on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import Block, ResidualChain, require_chain, require_eval_mode
from resnet_paths.core.inputs import Inputs, each_tensor, require_loader, unpack
from resnet_paths.core.parts import call_part
from resnet_paths.core.placement import device_of, place_modules
from resnet_paths.core.signature import arguments_of
from resnet_paths.lesions.frames import deletions_of
from resnet_paths.lesions.measures import validate_logits

__all__ = ["SCORES", "predicted_effects", "score_correlations"]

SCORES = ("first_order_loss_increase", "block_influence", "angular_distance", "relative_branch_norm")
"""Columns of `predicted_effects` that are held against measured effects."""


@torch.inference_mode(False)
def predicted_effects(
    chain: ResidualChain,
    loader: Iterable[object],
    *,
    feature_dim: int | None = None,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> pd.DataFrame:
    """Cheap scores of every block, from one forward and one backward pass per batch; nothing is deleted.

    Let T be what a block adds up and S what would be there without its branch: skip(h), or h itself in a plain block
    that keeps the shape. Means over examples, each with its standard error ``..._se``:

    ==============================  ================================================================================
    ``first_order_loss_increase``   <dL/dT, S - T>: the loss to first order, in nats; gradient times branch output
    ``block_influence``             1 - cos(post(S), post(T)) (ShortGPT, Men et al. 2024, equation 1)
    ``angular_distance``            arccos(cos(post(S), post(T))) / pi (Gromov et al. 2024, equation 4)
    ``relative_branch_norm``        norm of T - S over norm of S (Jastrzebski et al. 2018, section 4)
    ==============================  ================================================================================

    The cosine of two states that are 0 is taken as 1, and if only one is, as 0.

    Args:
        chain: The intact chain, in eval mode.
        loader: Batches as for `resnet_paths.lesion_study`.
        feature_dim: Dimension of the state over which cosines and norms are taken, such as -1 for tokens [batch, token,
            feature], averaged over all others; None takes an example's state as one vector.
        device: As for `resnet_paths.lesion_study`.
        progress: Whether to show a bar over batches.

    Returns:
        One row per block: ``block_index``, ``block`` (name), the scores and their standard errors over examples (NaN
        where the block cannot be deleted), ``num_examples``.

    Raises:
        ResnetPathsError: If the chain is in training mode, the loader is empty or does not give such batches, labels
            are out of range, or states have no dimension `feature_dim`.
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    require_loader(loader)
    (placed,) = place_modules([chain], device=device)
    of_batches = []
    for batch in tqdm(loader, desc="predicted effects", unit="batch", disable=not progress):
        # Copies: autograd cannot work with tensors of inference mode, and a stem written by hand may work in place.
        inputs, labels = each_tensor(lambda t: t.to(device_of(placed), copy=True), unpack(batch))
        if len(labels):
            of_batches.append(_scores(placed, inputs, labels, feature_dim))
    if not of_batches:
        raise ResnetPathsError("loader", "no batches", "a loader of at least one batch")
    scores = torch.cat(of_batches, dim=2)  # [block, score, example]
    num_examples = scores.shape[2]
    means = scores.mean(2)
    errors = scores.std(2, correction=min(1, num_examples - 1)) / math.sqrt(num_examples)
    if num_examples == 1:
        errors = torch.full_like(errors, math.nan)
    rows = []
    for index, block in enumerate(chain):
        row: dict[str, object] = {"block_index": index, "block": block.name or str(index)}
        for number, score in enumerate(SCORES):
            row |= {score: means[index, number].item(), f"{score}_se": errors[index, number].item()}
        rows.append(row | {"num_examples": num_examples})
    return pd.DataFrame(rows)


def score_correlations(predicted: pd.DataFrame, study: pd.DataFrame) -> pd.DataFrame:
    """How well each cheap score ranks the blocks, against what their deletion does.

    Args:
        predicted: From `predicted_effects`.
        study: From `resnet_paths.lesion_study`, with single deletions among its rows; others are left out.

    Returns:
        One row per score and effect (``error_rate_increase``, ``cross_entropy``): ``spearman`` and ``kendall``, rank
        correlations over blocks, with ``spearman_p`` and ``kendall_p``, two-sided p-values against no correlation;
        ``num_blocks``.

    Raises:
        ResnetPathsError: If a frame is of another kind, the study's rows are those of two, or fewer than three blocks
            are in both frames.
    """
    if "block_influence" not in predicted:
        raise ResnetPathsError("predicted", list(predicted.columns), "a frame with a column 'block_influence'")
    effects = ("error_rate_increase", "cross_entropy")
    single = deletions_of("study", study, 1, effects)
    single = single.assign(block_index=[block for (block,) in single["blocks"]])
    both = predicted.dropna(subset=list(SCORES)).merge(single, on="block_index", validate="one_to_one")
    if len(both) < 3:
        raise ResnetPathsError(
            "study",
            f"single deletions of {len(both)} of the blocks",
            "single deletions of at least three",
            "Study single_deletions(chain).",
        )
    rows = []
    for score in SCORES:
        for effect in effects:
            spearman, kendall = stats.spearmanr(both[score], both[effect]), stats.kendalltau(both[score], both[effect])
            rows.append({
                "score": score,
                "effect": effect,
                "spearman": float(spearman.statistic),
                "spearman_p": float(spearman.pvalue),
                "kendall": float(kendall.statistic),
                "kendall_p": float(kendall.pvalue),
                "num_blocks": len(both),
            })
    return pd.DataFrame(rows)


def _scores(chain: ResidualChain, inputs: Inputs, labels: torch.Tensor, dim: int | None) -> torch.Tensor:
    """[block, score, example] in float64."""
    args, kwargs = arguments_of(inputs)
    with torch.no_grad():
        start, context = chain.begin(*args, **kwargs)
    # From the first state on, which requires gradients even where no parameter does.
    rest = ResidualChain(nn.Identity(), chain, chain.head)
    with torch.enable_grad():
        logits, cache = rest.run_with_cache(start.requires_grad_(start.is_floating_point()), **context)
        logits = logits.movedim(validate_logits(logits, labels), 1)
        loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum")
        states = [state for state in cache.state if state is not None]  # every block has one
        gradients = torch.autograd.grad(loss, states[1:], materialize_grads=True)
    rows = []
    for block, state, skip, branch, gradient in zip(
        chain, states[:-1], cache.skip, cache.branch, gradients, strict=True
    ):
        _refuse_other_dim(dim, state.dim())
        alone = skip if chain.eval_only and skip is not None else _without_branch(block, state, context)
        if alone is None:
            rows.append(torch.full((len(SCORES), len(labels)), math.nan, dtype=torch.float64))
            continue
        total = skip if branch is None else branch if skip is None else skip + branch
        assert total is not None  # every block has a skip or a branch
        rows.append(_scores_of_block(block, alone.detach(), total.detach(), gradient, context, dim).cpu())
    return torch.stack(rows)


@torch.no_grad()
def _without_branch(block: Block, state: torch.Tensor, context: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What a block would add up without its branch, which may work in place; None if it cannot do without."""
    shared = call_part(block.pre, state.clone(), context)
    if block.skip is not None:
        return call_part(block.skip, shared, context)
    return shared if block.keeps_shape else None


def _scores_of_block(
    block: Block,
    alone: torch.Tensor,
    total: torch.Tensor,
    gradient: torch.Tensor,
    context: Mapping[str, torch.Tensor],
    dim: int | None,
) -> torch.Tensor:
    """[score, example] of one block, from what it adds up without its branch and with it, and dL/d its output."""
    total = total.requires_grad_()
    with torch.enable_grad():  # on copies: a `post` written by hand may work in place
        after = call_part(block.post, total.clone(), context)
        (gradient,) = torch.autograd.grad(after, total, gradient)
    with torch.no_grad():
        difference = wide(alone - total)
        first_order = (wide(gradient) * difference).flatten(1).sum(1)
        one, other = (_vectors(wide(x), dim) for x in (call_part(block.post, alone.clone(), context), after))
        cosine = F.cosine_similarity(one, other, dim=-1).clamp(-1, 1)
        cosine[(one == 0).all(-1) & (other == 0).all(-1)] = 1  # nothing changed
        changed, left = (_vectors(s, dim).norm(dim=-1) for s in (difference, wide(alone)))
        norm = torch.where(changed == 0, 0.0, changed / left)
        per_example = [first_order, *((v.flatten(1).mean(1)) for v in (1 - cosine, cosine.acos() / math.pi, norm))]
        return torch.stack(per_example)


def _refuse_other_dim(dim: int | None, rank: int) -> None:
    if dim is not None and (not -rank <= dim < rank or dim % rank == 0):
        raise ResnetPathsError(
            "feature_dim", dim, f"None, or a dimension of the states, from 1 to {rank - 1} or from the end"
        )


def _vectors(state: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The state as vectors, [batch, position, feature]."""
    if dim is None:
        return state.flatten(1)[:, None]
    return state.movedim(dim, -1).reshape(len(state), -1, state.shape[dim])

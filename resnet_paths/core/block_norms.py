"""Norms and directions of what each block reads, adds and passes on.

Computing them takes one forward pass. `resnet_paths.lesions.predicted` has scores of this kind, which predict the
effect of a deletion.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from resnet_paths._utils.devices import wide
from resnet_paths._utils.statistics import mean_over_items
from resnet_paths.core.chain import ResidualChain, require_chain
from resnet_paths.core.inputs import (
    Inputs,
    InputsOrLoader,
    batches_of,
    each_tensor,
    require_movable,
)
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.parts import call_part
from resnet_paths.core.placement import device_of
from resnet_paths.core.positions import Tokens, counted_positions, validate_tokens, vectors_of
from resnet_paths.core.signature import arguments_of

__all__ = ["block_norms"]

_COLUMNS = ("input_norm", "skip_norm", "branch_norm", "sum_norm", "cosine", "kept_signal_share")


@torch.no_grad()
def block_norms(chain: ResidualChain, inputs: InputsOrLoader, *, tokens: Tokens = None) -> pd.DataFrame:
    """Norms of x, F(x) and F(x) + x in each block, and the direction of F(x).

    Norms are Euclidean, of the state x of each example or of the vector of each token; context, such as an attention
    mask, and padding are left out. ``kept_signal_share`` is the component of the output y of a block along s, the state
    on the path of skips alone: <s, y> / <y, y>, which is 1 if the branches have added nothing.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`; targets are not read.
        tokens: Which tokens of states [batch, token, feature] are measured, as for `resnet_paths.predicted_effects`;
            None for whole examples. Tokens where a mapping's ``"attention_mask"`` [batch, token] is 0 do not count.

    Returns:
        One row per block: ``block_index``, ``block`` (name), ``stage``, ``skip_kind``; means over examples or over all
        tokens, each with its standard error ``..._se``, with examples as clusters: ``input_norm`` of x, ``skip_norm``
        of what the skip makes of it (x itself for an identity), ``branch_norm`` of F(x), ``sum_norm`` of their sum,
        before what may follow the addition; ``cosine`` of the angle between skip and branch;
        ``kept_signal_share``, NaN after a block without skip; ``num_examples``.

    Raises:
        ResnetPathsError: If the chain is in training mode, there is no example, blocks work on several tensors, or
            `tokens` does not fit the states.
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    validate_tokens(tokens)
    device = device_of(chain)
    found = []
    for batch, _ in batches_of(inputs):
        require_movable("inputs", batch, device)
        found.append(_of_batch(chain, each_tensor(lambda t: t.to(device), batch), tokens))
    values = np.concatenate(found, 3)  # [block, column, sum and number, example]
    mean, error = mean_over_items(values[:, :, 0], values[:, :, 1])
    frame = pd.DataFrame({
        "block_index": range(len(chain)),
        "block": [block.name for block in chain],
        "stage": [block.stage for block in chain],
        "skip_kind": [block.skip_kind for block in chain],
    })
    for number, name in enumerate(_COLUMNS):
        frame[name], frame[f"{name}_se"] = mean[:, number], error[:, number]
    frame["num_examples"] = values.shape[3]
    return frame


def _of_batch(chain: ResidualChain, inputs: Inputs, tokens: Tokens) -> np.ndarray:
    """[block, column, sum over the vectors of an example and their number, example] in float64."""
    args, kwargs = arguments_of(each_tensor(torch.clone, inputs))
    _, cache = chain.run_with_cache(*args, **kwargs)
    kept = cache.state[0]
    states = [state for state in cache.state if state is not None]  # every block has one
    dim, positions = None if tokens is None else -1, counted_positions(inputs, tokens, states)
    rows = []
    for index, block in enumerate(chain):
        skip, branch = cache.skip[index], cache.branch[index]
        total = skip if branch is None else branch if skip is None else skip + branch
        assert total is not None  # held by Block
        # The addition may broadcast one of them.
        skip, branch = (None if part is None else part.expand(total.shape) for part in (skip, branch))
        if kept is None or block.skip is None:
            kept = None
        else:
            kept = call_part(block.replace(branch=None), kept.clone(), cache.context)
        after = cache.state[index + 1]
        assert after is not None  # every block has an output
        x, one, other, whole, y, left = (
            None if part is None else vectors_of(wide(part), dim, positions)
            for part in (cache.state[index], skip, branch, total, after, kept)
        )
        assert whole is not None
        missing = torch.full_like(whole[0][..., 0], math.nan), whole[1]
        columns = [missing if part is None else (part[0].norm(dim=-1), part[1]) for part in (x, one, other, whole)]
        columns.append(missing if one is None or other is None else (_cosine(one[0], other[0]), whole[1]))
        columns.append(missing if left is None or y is None else (_share(left[0], y[0]), y[1]))
        each, counts = (torch.stack(pieces) for pieces in zip(*columns, strict=True))
        known = counts & ~each.isnan()
        rows.append(torch.stack([torch.where(known, each, 0).sum(-1), known.sum(-1).to(each)], 1).cpu().numpy())
    return np.reshape(rows, (len(chain), len(_COLUMNS), 2, len(states[0])))


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """NaN where one of them is 0: it has no direction."""
    cosine: torch.Tensor = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
    return cosine


def _share(kept: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """NaN where the output is 0."""
    share: torch.Tensor = (kept * output).sum(-1) / (output * output).sum(-1)
    return share

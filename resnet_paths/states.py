"""What every block reads, adds and passes on: the sizes and directions of the states of a real network.

The forward pass only. What the sizes predict about a deletion is in `resnet_paths.lesions.predicted`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch

from resnet_paths.batches import batches_of, call, each_tensor, num_examples
from resnet_paths.chain import Block, ResidualChain, refuse_other_than_chain, refuse_training_mode
from resnet_paths.errors import ResnetPathsError
from resnet_paths.examples import mean_over_examples
from resnet_paths.placement import device_of

__all__ = ["block_norms"]

_COLUMNS = ("input_norm", "skip_norm", "branch_norm", "sum_norm", "cosine", "kept_signal_share")


@torch.no_grad()
def block_norms(chain: ResidualChain, inputs: Any) -> pd.DataFrame:
    """How large x, F(x) and F(x) + x are in every block, and which way F(x) points.

    Norms are Euclidean, of an example's whole state. The signal kept along the skip is what the path of skips alone,
    which takes no branch at all, brings to a block's output: with s that path's state and y the output, the share is
    <s, y> / <y, y>, 1 where the branches have added nothing.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`; targets are not read.

    Returns:
        A row a block: ``block_index``, ``block`` (name), ``stage``, ``skip_kind``; means over examples, each with its
        standard error ``..._se``: ``input_norm`` of x, ``skip_norm`` of what the skip makes of it (x itself for an
        identity), ``branch_norm`` of F(x), ``sum_norm`` of their sum, ahead of what may follow the addition; ``cosine``
        of the angle between skip and branch; ``kept_signal_share``, NaN behind a block without skip; ``num_examples``.

    Raises:
        ResnetPathsError: If the chain is in training mode, there is no example, or a state is not one tensor.
    """
    refuse_other_than_chain("chain", chain)
    refuse_training_mode("chain", chain)
    device = device_of(chain)
    found = []
    for batch, _ in batches_of(inputs):
        if num_examples(batch):
            found.append(_of_batch(chain, each_tensor(lambda t: t.to(device), batch)))
    if not found:
        raise ResnetPathsError("inputs", "no examples", "at least one example")
    values = np.concatenate(found, 2)  # [block, column, example]
    mean, error = mean_over_examples(values)
    frame = pd.DataFrame({
        "block_index": range(len(chain)),
        "block": [block.name for block in chain],
        "stage": [block.stage for block in chain],
        "skip_kind": [block.skip_kind for block in chain],
    })
    for number, name in enumerate(_COLUMNS):
        frame[name], frame[f"{name}_se"] = mean[:, number], error[:, number]
    frame["num_examples"] = values.shape[2]
    return frame


def _of_batch(chain: ResidualChain, inputs: Any) -> np.ndarray:
    """[block, column, example] in float64."""
    state = call(chain.stem, each_tensor(torch.clone, inputs))
    kept: torch.Tensor | None = state
    rows = []
    for block in chain:
        if not isinstance(state, torch.Tensor):
            raise ResnetPathsError("chain", f"block {block.name!r} with a pair as its state", "blocks of one tensor")
        # Copies: parts written by hand may work in place.
        skip = None if block.skip is None else block.skip(block.pre(state.clone()))
        branch = None if block.branch is None else block.branch(block.pre(state.clone()))
        sides = [part for part in (skip, branch) if part is not None]
        total = sides[0] if len(sides) == 1 else sides[0] + sides[1]
        read, state = state, block.post(total.clone())
        kept = None if kept is None or block.skip is None else _along_skip(block, kept)
        one, other = (None if part is None else part.double().flatten(1) for part in (skip, branch))
        missing = torch.full((len(total),), math.nan, dtype=torch.float64, device=total.device)
        cosine = missing if one is None or other is None else _cosine(one, other)
        norms = [missing if part is None else part.double().flatten(1).norm(dim=1) for part in (read, one, other)]
        share = missing if kept is None else _share(kept, state)
        rows.append(torch.stack([*norms, total.double().flatten(1).norm(dim=1), cosine, share]).cpu().numpy())
    return np.stack(rows)


def _along_skip(block: Block, kept: torch.Tensor) -> torch.Tensor:
    passed: torch.Tensor = block.replace(branch=None)(kept.clone())
    return passed


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """NaN where one of them is 0: it has no direction."""
    cosine: torch.Tensor = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    return cosine


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    part, whole = part.double().flatten(1), whole.double().flatten(1)
    return (part * whole).sum(1) / (whole * whole).sum(1)

"""Logit lens and Jacobian lens: the prediction that the head makes from the state after each block.

The state ``x_l`` after block l reaches the head along the paths through the later blocks. At the activations of an
example each path is a linear map ``J_p``, and the lens of length k applies the head to the sum over the paths with at
most k branches:

    lens_k(x_l) = head( sum over paths p from x_l to the head with at most k branches of J_p x_l )

Length 0 follows the skips only. If these are identities and nothing follows the additions, it is the head applied to
the state: the logit lens (nostalgebraist 2020). All lengths together give the product of the Jacobians of the later
blocks: the Jacobian lens (Gurnee et al. 2026), with the Jacobian of the example itself instead of a mean over examples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from resnet_paths._utils.arguments import require_function, require_int
from resnet_paths._utils.statistics import mean_over_examples, mean_rate_interval
from resnet_paths.core.backward.forward import ForwardPass, prepared, split_to_fit
from resnet_paths.core.backward.linearize import Context, Pullback, expanded, unchanged
from resnet_paths.core.backward.recursion import Linearizer
from resnet_paths.core.backward.tangents import DIFFERENTIABLE_PULLBACKS, pushed
from resnet_paths.core.chain import Block, ResidualChain, require_chain
from resnet_paths.core.inputs import InputsOrLoader, batches_with_bar
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.parts import call_part
from resnet_paths.core.paths import path_polynomial
from resnet_paths.predictions.detached import linearizer_of
from resnet_paths.predictions.outputs import Logits, class_logits, predicted_classes, require_predictions

__all__ = ["lens"]

_CHUNK_BYTES = 2**23  # size of the stack of tangents for one Jacobian product


@torch.inference_mode(False)
def lens(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    *,
    max_length: int | None = 0,
    linearization: str = "tangent",
    logits: Logits | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The prediction from the state after each block, through paths with up to `max_length` later branches.

    See `resnet_paths.predictions.lens`. The later blocks are linearized at the activations of the example; only the
    linear part is applied, without constants. A block that changes the shape passes the state on through its skip, the
    projection. What precedes skip and branch (`pre`) and what follows the addition (`post`) is applied to every path:
    with a ReLU after the addition, the values that the ReLU sets to 0 for the example are 0. A block without a skip has
    no path of length 0, so that earlier states have no rows for the shortest lengths. The context, such as an attention
    mask, is constant.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`. Labels are not used.
        max_length: Maximum number of later branches in a path: 0 for the logit lens, None for all paths, up to the
            Jacobian lens. The cost for n blocks is about n^2 `max_length` / 2 products of a block's Jacobian with a
            vector, and n^3 / 6 for all lengths.
        linearization: ``"tangent"`` or ``"detached"``, as for `resnet_paths.prediction_by_path_length`.
        logits: Function from the output of the chain to logits [batch, class] or [batch, ..., class], such as
            ``lambda outputs: outputs[:, -1]`` for the last token; None if the chain returns logits. For several
            positions per example, such as tokens, the mean over all positions is taken, padding included.
        memory_budget: Maximum number of bytes for tangents and activations; batches are split to fit.
        progress: Whether to show a progress bar over the batches of a loader.

    Returns:
        One row per state and length: ``depth``, the number of blocks before the state; ``block``, the last of them, or
        ``"stem"``; ``path_length``, the maximum number of later branches; ``num_paths``, the number of paths of this
        length or shorter, an exact int; ``kl_divergence``, the Kullback-Leibler divergence of the lens from the output
        of the chain in nats; ``agreement``, the share of predictions that equal those of the chain, with a 95 %
        interval ``agreement_low`` to ``agreement_high``; ``prediction_rank``, the rank of the chain's prediction in
        the lens, counted from 1. These are means over examples, of which each counts with its mean over positions,
        however many it has; ``kl_divergence_se`` and ``prediction_rank_se`` are their standard errors. Where logits of
        the lens are not finite, it agrees with no prediction, the rank is the last one, and a divergence that is NaN is
        left out.
        ``attrs`` contain ``linearization``, ``tangent_operations`` and ``num_examples``.

    Raises:
        ResnetPathsError: If the chain is in training mode, an option is unknown, there are no logits of two or more
            classes, or an activation or a logit of the network is not finite (the message states the first block);
            minus infinity masks a class.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> blocks = [Block(torch.nn.Linear(3, 3), torch.nn.Identity(), name=f"block{i}") for i in range(2)]
        >>> chain = ResidualChain(torch.nn.Identity(), blocks, torch.nn.Linear(3, 4))
        >>> frame = lens(chain, torch.ones(2, 3), max_length=None)
        >>> frame.num_paths.tolist()  # of at most 0, 1 and 2 branches from the stem, then from each block
        [1, 3, 4, 1, 2, 1]
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    linearizer, tangents = linearizer_of(linearization)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    max_length = None if max_length is None else require_int("max_length", max_length, 0)
    if logits is not None:
        require_function("logits", logits, "a function from outputs to logits [batch, ..., class], or None")
    blocks = list(chain)
    counts = [path_polynomial(chain.with_blocks(blocks[start:])) for start in range(len(blocks) + 1)]
    # One row per state and length of its paths.
    keys = [
        (start, k)
        for start, of_length in enumerate(counts)
        for k, count in enumerate(of_length)
        if count and (max_length is None or k <= max_length)
    ]
    num_rows = [sum(start <= place for start, _ in keys) for place in range(len(counts))]
    found = []
    for batch, _ in batches_with_bar("lens", inputs, None, progress):
        for part, _ in split_to_fit(chain, *prepared(chain, batch, None), memory_budget, num_rows):
            point = ForwardPass(chain, part)
            found.append(_measured(chain, point, keys, logits, linearizer))
    divergence, agreement, rank, num_positions = np.concatenate(found, 2)
    frame = pd.DataFrame({
        "depth": [start for start, _ in keys],
        "block": [blocks[start - 1].name if start else "stem" for start, _ in keys],
        "path_length": [k for _, k in keys],
        "num_paths": pd.Series([sum(counts[start][: k + 1]) for start, k in keys], dtype=object),
    })
    frame["kl_divergence"], frame["kl_divergence_se"] = mean_over_examples(divergence)
    frame["agreement"], _ = mean_over_examples(agreement)
    bounds = [mean_rate_interval(*row) for row in zip(agreement, num_positions, strict=True)]
    frame["agreement_low"], frame["agreement_high"] = ([bound[i] for bound in bounds] for i in (0, 1))
    frame["prediction_rank"], frame["prediction_rank_se"] = mean_over_examples(rank)
    frame.attrs |= {
        "linearization": linearization,
        "tangent_operations": sorted(tangents),
        "num_examples": divergence.shape[1],
    }
    return frame


@dataclass(frozen=True)
class _Tangents:
    """Tangents of a state, one row per start and path length.

    Attributes:
        keys: Number of blocks before the start, and path length, of each row.
        rows: Tensor [row, batch, ...].
    """

    keys: list[tuple[int, int]]
    rows: torch.Tensor

    def pushed(self, pullback: Pullback, output: torch.Tensor) -> _Tangents:
        """The tangents of the output of a part."""
        if pullback is unchanged:
            return self
        size = max(_CHUNK_BYTES // max(output[None].nbytes, self.rows[:1].nbytes), 1)
        chunks = [pushed(pullback, output, chunk) for chunk in torch.split(self.rows, size)]
        return _Tangents(self.keys, torch.cat(chunks))

    def up_to(self, longest: int) -> _Tangents:
        """The rows of paths with at most `longest` branches."""
        chosen = [row for row, (_, k) in enumerate(self.keys) if k <= longest]
        return self if len(chosen) == len(self.keys) else _Tangents([self.keys[i] for i in chosen], self.rows[chosen])

    def expanded(self, total: torch.Tensor) -> _Tangents:
        """The same rows in the shape of a sum, whose addition may broadcast them."""
        return _Tangents(self.keys, expanded(self.rows, total))

    def longer(self) -> _Tangents:
        """The same rows for paths with one more branch."""
        return _Tangents([(start, k + 1) for start, k in self.keys], self.rows)


def _summed(several: Sequence[_Tangents]) -> _Tangents:
    """The sum; rows with the same start and length are added."""
    if len(several) == 1:
        return several[0]
    keys = sorted({key for one in several for key in one.keys})
    position = {key: row for row, key in enumerate(keys)}
    total = several[0].rows.new_zeros(len(keys), *several[0].rows.shape[1:])
    for one in several:
        index = torch.tensor([position[key] for key in one.keys], dtype=torch.int64, device=total.device)
        total.index_add_(0, index, one.rows)
    return _Tangents(keys, total)


@dataclass(frozen=True)
class _Push:
    """The forward pass of a state together with its tangents.

    Attributes:
        context: The context.
        linearizer: Linearizes a part at a point.
        longest: Maximum path length.
    """

    context: Context
    linearizer: Linearizer
    longest: int

    def through_part(self, part: nn.Module, state: torch.Tensor, tangents: _Tangents) -> tuple[torch.Tensor, _Tangents]:
        """Output and tangents of a part."""
        with DIFFERENTIABLE_PULLBACKS:
            output, pullback = self.linearizer(part, state, self.context)
        return output, tangents.pushed(pullback, output)

    def through_block(self, block: Block, state: torch.Tensor, tangents: _Tangents) -> tuple[torch.Tensor, _Tangents]:
        """Output and tangents of a block."""
        state, tangents = self.through_part(block.pre, state, tangents)
        arrived = [] if block.skip is None else [self.through_part(block.skip, state, tangents)]
        shorter = tangents.up_to(self.longest - 1)
        for branch in block.branches:
            if isinstance(branch, ResidualChain) and len(branch):
                output, found = self.through_chain(branch, state, shorter)
            else:
                output, found = self.through_part(branch, state, shorter)
            arrived.append((output, found.up_to(self.longest - 1).longer()))
        total = functools.reduce(torch.add, (output for output, _ in arrived))
        return self.through_part(block.post, total, _summed([found.expanded(total) for _, found in arrived]))

    def through_chain(
        self, chain: ResidualChain, state: torch.Tensor, tangents: _Tangents
    ) -> tuple[torch.Tensor, _Tangents]:
        """Output and tangents of a chain in a branch."""
        state, tangents = self.through_part(chain.stem, state, tangents)
        for block in chain:
            state, tangents = self.through_block(block, state, tangents)
        return self.through_part(chain.head, state, tangents)


@torch.no_grad()
def _measured(
    chain: ResidualChain,
    point: ForwardPass,
    keys: Sequence[tuple[int, int]],
    logits: Logits | None,
    linearizer: Linearizer,
) -> np.ndarray:
    """KL divergence, agreement, rank and number of positions, [4, row, batch]."""
    push = _Push(Context(point.context.values), linearizer, max(k for _, k in keys))
    first = point.states[0]
    tangents = _Tangents([(0, 0)], first[None])
    for start, (block, state) in enumerate(zip(chain, point.states, strict=False), start=1):
        _, tangents = push.through_block(block, state, tangents)
        tangents = _summed([tangents, _Tangents([(start, 0)], point.states[start][None])])

    def read(state: torch.Tensor) -> torch.Tensor:
        outputs = call_part(chain.head, state.clone(), point.context.values)
        return class_logits(outputs if logits is None else logits(outputs), point.num_examples)

    intact = read(point.states[-1])
    of_key = dict(zip(tangents.keys, tangents.rows, strict=True))
    measured, total = [], first
    for start, k in keys:
        shorter = [i for i in range(k) if (start, i) in of_key]
        total = of_key[start, k] + (total if shorter else 0)
        measured.append(_compared(read(total), intact))
    return np.stack(measured, 1)


def _compared(logits: torch.Tensor, intact: torch.Tensor) -> np.ndarray:
    """KL divergence, agreement, rank and number of positions, [4, batch]."""
    predicted, found = require_predictions(intact), predicted_classes(logits)
    of_intact = intact.log_softmax(2)
    share = of_intact.exp()
    # Classes of probability 0, such as those that a network masks, add nothing.
    divergence = torch.where(share == 0, 0.0, share * (of_intact - logits.log_softmax(2))).sum(2)
    agreement = (found == predicted).double()
    rank = 1 + (logits > logits.gather(2, predicted[..., None])).sum(2)
    rank = torch.where(found < 0, logits.shape[2], rank).double()
    means = [values.mean(1) for values in (divergence, agreement, rank)]
    return torch.stack([*means, torch.full_like(means[0], intact.shape[1])]).cpu().numpy()

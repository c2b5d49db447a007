"""Iterative inference: whether each block refines the prediction (Jastrzębski et al. 2018).

To first order an update ``u`` of a state ``z`` changes a loss ``L`` by its product with the gradient:

    L(z + u) - L(z) = <u, dL/dz> + O(|u|^2)

If blocks refine the prediction, their updates have a negative cosine with the gradient, they are small, and the
prediction of the head from an earlier state improves block by block. Here ``u`` is the output of a block's branch and
``z`` the output of its skip, which is the input of the block if the skip is the identity. The early exit after a block
is the output of the network with the branches of all later blocks deleted; if their skips are identities and nothing
follows the additions, it is the head applied to the state, as in the logit lens (`resnet_paths.lens`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from resnet_paths._utils.arguments import require_function, require_int
from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import mean_over_examples, mean_rate_interval
from resnet_paths.core.backward.cotangents import Cotangents
from resnet_paths.core.backward.forward import ForwardPass, prepared, split_to_fit
from resnet_paths.core.backward.linearize import Context
from resnet_paths.core.backward.recursion import Rules, head_cotangents, pull_back
from resnet_paths.core.chain import Block, ResidualChain, is_identity, require_chain
from resnet_paths.core.edits import deletable, delete_blocks
from resnet_paths.core.inputs import InputsOrLoader, batches_with_bar
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.parts import call_part
from resnet_paths.predictions.outputs import Logits, class_logits, predicted_classes, require_predictions

__all__ = ["iterative_inference"]

_RATES = ("error_rate", "final_share")
_MEANS = (
    "cross_entropy",
    "cross_entropy_change",
    "first_order_change",
    "gradient_cosine",
    "early_exit_gradient_cosine",
    "update_ratio",
    "state_angle",
    "update_angle",
)


@torch.inference_mode(False)
def iterative_inference(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: torch.Tensor | None = None,
    *,
    logits: Logits | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """Loss and prediction of an early exit after each block, and size and direction of the block's update.

    See `resnet_paths.predictions.iterative`. Its cost is a forward and a backward pass of the chain and, for each
    block, one of the head and of those later skips that are not the identity. A block without a skip that keeps the
    shape is replaced by the identity where it is deleted, as by `resnet_paths.delete_block`, and its update is the
    difference of output and input; there is no early exit before one that changes the shape.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`.
        targets: Class indices [batch], or [batch, position] for logits of several positions; None for the classes that
            the network predicts, and with a loader, whose labels are the targets.
        logits: Function from the output of the chain to logits [batch, class] or [batch, ..., class], such as
            ``lambda outputs: outputs[:, -1]`` for the last token; None if the chain returns logits. The loss of an
            example is the mean over its positions, padding included.
        memory_budget: Maximum number of bytes for activations; batches are split to fit.
        progress: Whether to show a progress bar over the batches of a loader.

    Returns:
        One row per block: ``block_index``, ``block``, ``stage``, ``skip_kind``. Of the early exit after the block:
        ``cross_entropy`` in nats; ``error_rate``; ``final_share``, the share of examples whose prediction is that of
        the network here and at all later exits. Of the update: ``cross_entropy_change``, the cross-entropy of the early
        exit after the block less that before it; ``first_order_change``, the same to first order;
        ``gradient_cosine``, the cosine of the angle between the update and the gradient of the network's loss with
        respect to the input of the block, negative if the update reduces the loss to first order (NaN if the block
        changes the shape); ``early_exit_gradient_cosine``, that of the update and the gradient of the loss of the early
        exit; ``update_ratio``, the norm of the update over that of the state; ``state_angle``, the angle between state
        and updated state in degrees; ``update_angle``, the angle between the updates of the preceding block and of this
        one in degrees (NaN if their shapes differ). These are means over examples, ``..._se`` their standard errors;
        rates have a 95 % interval ``..._low`` to ``..._high``. An example with several positions counts with its mean
        over them, however many it has. What has no early exit is NaN. Logits that are not finite predict no class: they
        count as wrong, and a cross-entropy that is NaN is left out of the mean. ``attrs`` contain ``num_examples``.

    Raises:
        ResnetPathsError: If the chain is in training mode, there are no logits of two or more classes, the targets are
            no class indices of the logits, or an activation or a logit of the network is not finite (the message
            states the first block); minus infinity masks a class.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> blocks = [Block(torch.nn.Linear(2, 2), torch.nn.Identity(), name=f"block{i}") for i in range(2)]
        >>> for block in blocks:  # each adds the difference of the logits to the first of them
        ...     _ = torch.nn.init.zeros_(block.branch.bias)
        ...     block.branch.weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
        >>> chain = ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity()).eval()
        >>> frame = iterative_inference(chain, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        >>> frame.cross_entropy.round(4).tolist()  # log(1 + exp(-2)), log(1 + exp(-4))
        [0.1269, 0.0181]
        >>> frame.gradient_cosine.round(4).tolist()
        [-0.7071, -0.7071]
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    if logits is not None:
        require_function("logits", logits, "a function from outputs to logits [batch, ..., class], or None")
    possible = deletable(chain)
    without = delete_blocks(chain, possible)
    skips: list[Block | None] = [None] * len(chain)
    for index in possible:
        skips[index] = without[index]
    found = []
    for batch, labels in batches_with_bar("iterative inference", inputs, targets, progress):
        for part, some in split_to_fit(chain, *prepared(chain, batch, labels), memory_budget, len(chain) + 1):
            found.append(_Measurement(chain, skips, ForwardPass(chain, part), some, logits).columns())
    columns = {name: np.concatenate([each[name] for each in found], 1) for name in found[0]}
    frame = pd.DataFrame({
        "block_index": range(len(chain)),
        "block": [block.name for block in chain],
        "stage": [block.stage for block in chain],
        "skip_kind": [block.skip_kind for block in chain],
    })
    for name in _MEANS:
        frame[name], frame[f"{name}_se"] = mean_over_examples(columns[name])
    for name in _RATES:
        frame[name] = mean_over_examples(columns[name])[0]
        bounds = [mean_rate_interval(*row)[:2] for row in zip(columns[name], columns["num_positions"], strict=True)]
        frame[[f"{name}_low", f"{name}_high"]] = np.reshape(bounds, (-1, 2))
    frame.attrs["num_examples"] = columns["num_positions"].shape[1]
    return frame


@dataclass(frozen=True)
class _Exit:
    """An early exit from a state ``z``; NaN where there is none.

    Attributes:
        loss: Loss of each example, [batch].
        predicted: Predicted class, [batch, position]; -1 where the logits are not finite.
        gradient: Gradient of the loss with respect to ``z``, [batch, number].
    """

    loss: torch.Tensor
    predicted: torch.Tensor
    gradient: torch.Tensor


class _Measurement:
    """Some examples: their early exits, and the updates of their states.

    Args:
        chain: The chain.
        skips: Each block without its branch; None if it cannot be deleted.
        point: The forward pass.
        targets: Class indices, or None for the predicted classes.
        logits: From the output of the chain to logits.
    """

    def __init__(
        self,
        chain: ResidualChain,
        skips: Sequence[Block | None],
        point: ForwardPass,
        targets: object,
        logits: Logits | None,
    ) -> None:
        self.chain, self.skips, self.point, self.logits = chain, skips, point, logits
        # Most skips are identities: left out, an early exit costs a head and not a walk over all later blocks.
        self.not_identities = [index for index, skip in enumerate(skips) if skip is None or not _is_identity(skip)]
        with torch.no_grad():
            intact = self._read(call_part(chain.head, point.states[-1].clone(), point.context.values))
        predicted = require_predictions(intact)
        self.targets = predicted if targets is None else _class_indices(targets, intact)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of the frame for each example, [block, example], and its number of positions."""
        pairs = [self._state_and_update(index) for index in range(len(self.chain))]
        exits = [self._early_exit(index, state) for index, (state, _) in enumerate(pairs)]
        exits.append(self._early_exit(len(self.chain), self.point.states[-1]))
        pairs = [(_vectors(state), _vectors(update)) for state, update in pairs]
        updates = [update for _, update in pairs]
        losses = torch.stack([found.loss for found in exits])
        slopes = [found.gradient for found in exits[:-1]]
        none = losses.new_empty(0)
        columns: dict[str, Sequence[torch.Tensor]] = {
            "cross_entropy": [*losses[1:]],
            "cross_entropy_change": [*losses.diff(dim=0)],
            "first_order_change": [(u * slope).sum(1) for u, slope in zip(updates, slopes, strict=True)],
            "gradient_cosine": [_cosine(g, u) for g, u in zip(self._gradients(), updates, strict=True)],
            "early_exit_gradient_cosine": [_cosine(g, u) for g, u in zip(slopes, updates, strict=True)],
            "update_ratio": [update.norm(dim=1) / state.norm(dim=1) for state, update in pairs],
            "state_angle": [_angle(state, state + update) for state, update in pairs],
            "update_angle": [_angle(before, u) for before, u in zip([none, *updates], updates, strict=False)],
            **self._rates([found.predicted for found in exits[1:]]),
        }
        # Concatenated and not stacked: a chain may have no blocks.
        arrays = {n: torch.cat([losses[:0], *(row[None] for row in rows)]).cpu().numpy() for n, rows in columns.items()}
        return {**arrays, "num_positions": np.full(losses[1:].shape, self.targets.shape[1])}

    @torch.no_grad()
    def _state_and_update(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``z`` and ``u`` of a block, NaN if it cannot be deleted."""
        block, skip = self.chain[index], self.skips[index]
        context = self.point.context.values  # noqa: PD011 - of a Context
        shared = call_part(block.pre, self.point.states[index].clone(), context)
        total = block.added_up(shared.clone(), context)
        if skip is None:
            return torch.full_like(total, torch.nan), torch.full_like(total, torch.nan)
        state = skip.added_up(shared, context)
        return state, total - state

    def _early_exit(self, index: int, state: torch.Tensor) -> _Exit:
        """The early exit from the state of a block, along its `post` and the skips of the later blocks."""
        later = [self.skips[place] for place in self.not_identities if place > index]
        leaf = state.detach().clone().requires_grad_()
        if bool(leaf.isnan().any()) or None in later:
            nothing = torch.full_like(_vectors(state), torch.nan)
            return _Exit(nothing[:, 0], nothing[:, :1].expand(self.targets.shape), nothing)
        parts: list[nn.Module] = [self.chain[index].post] if index < len(self.chain) else []
        parts += [skip for skip in later if skip is not None]
        context = self.point.context.values  # noqa: PD011 - of a Context
        with torch.enable_grad():
            last = functools.reduce(lambda x, part: call_part(part, x, context), parts, leaf.clone())
            logits = self._read(call_part(self.chain.head, last, context))
            loss = self._loss(logits)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return _Exit(loss.detach(), predicted_classes(logits.detach()).double(), _vectors(gradient))

    def _gradients(self) -> list[torch.Tensor]:
        """The gradient of the network's loss with respect to the input of each block, each up to a factor."""
        chain, states, context = self.chain, self.point.states, Context(self.point.context.values)
        slope, _ = head_cotangents(chain, states[-1], context, lambda outputs: self._loss(self._read(outputs)))
        found, above = [], Cotangents.of(slope, {})
        for index in reversed(range(len(chain))):
            above = pull_back(chain, states, context, above, Rules(counted=False), down_to=index, up_from=index + 1)
            found.append(_vectors(above.state.values[0, 0]))  # noqa: PD011 - of a Stack
        return found[::-1]

    def _rates(self, predicted: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """Error rate and share of final predictions of the early exits, over the positions of each example."""
        wrong: list[torch.Tensor] = []
        final: list[torch.Tensor] = []
        same = torch.ones_like(self.targets, dtype=torch.bool)
        for classes in reversed(predicted):
            known = ~classes.isnan()
            same = same & ((classes == predicted[-1]) | ~known)
            for rows, values in ((wrong, classes != self.targets), (final, same)):
                rows.append(torch.where(known, values.double(), torch.nan).mean(1))
        return {"error_rate": wrong[::-1], "final_share": final[::-1]}

    def _read(self, outputs: object) -> torch.Tensor:
        return class_logits(outputs if self.logits is None else self.logits(outputs), self.point.num_examples)

    def _loss(self, logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.movedim(2, 1), self.targets, reduction="none").mean(1)


def _is_identity(block: Block) -> bool:
    """Whether a block returns its input as it is."""
    parts = (block.pre, block.skip, block.post)
    return block.branch is None and block.run is None and all(is_identity(part) for part in parts)


def _class_indices(targets: object, logits: torch.Tensor) -> torch.Tensor:
    """The targets as class indices [batch, position]."""
    size, positions, classes = logits.shape
    shapes = [(size, positions), *([(size,)] if positions == 1 else [])]
    real = isinstance(targets, torch.Tensor) and (targets.is_floating_point() or targets.is_complex())
    if not isinstance(targets, torch.Tensor) or real or targets.shape not in shapes:
        found = f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, torch.Tensor) else targets
        raise ResnetPathsError("targets", found, f"class indices {list(shapes[-1])}, or None for the predicted classes")
    if not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        limits = sorted({int(targets.min()), int(targets.max())})
        raise ResnetPathsError("targets", limits, f"class indices from 0 to {classes - 1}")
    return targets.long().reshape(size, positions)


def _vectors(state: torch.Tensor) -> torch.Tensor:
    """One float64 vector per example."""
    return wide(state.detach()).flatten(1)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle of each example; NaN if the shapes differ, or a vector is 0."""
    if one.shape != other.shape:
        return torch.full_like(other[:, 0], torch.nan)
    cosine: torch.Tensor = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    return cosine


def _angle(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The angle in degrees."""
    return torch.rad2deg(torch.arccos(_cosine(one, other).clamp(-1, 1)))

"""The default loss of an example: cross-entropy, for targets that cross-entropy is meant for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["Loss", "checked_losses", "cross_entropy"]

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
"""From what the network returns, and targets, to losses [batch]."""

_SQUARED_ERROR = "For a regression, pass loss=lambda outputs, targets: (outputs - targets).square().flatten(1).mean(1)."
_ONE_LOGIT = (
    "Pass loss=lambda logits, targets: torch.nn.functional.binary_cross_entropy_with_logits("
    "logits.flatten(), targets.flatten().to(logits.dtype), reduction='none')."
)


def cross_entropy(logits: object, targets: object) -> torch.Tensor:
    """Cross-entropy of each example.

    Args:
        logits: What the network returns, [batch, class].
        targets: Class indices [batch] of any integer dtype or bool, or class probabilities [batch, class].

    Returns:
        Losses [batch].

    Raises:
        ResnetPathsError: If the targets are neither of these, such as the numbers of a regression, or the network
            returns one logit.
    """
    if not isinstance(targets, torch.Tensor):
        raise ResnetPathsError(
            "targets",
            type(targets).__name__,
            "class indices [batch], or another loss",
            "Pass targets, or loss=lambda logits, targets: ... that needs none.",
        )
    if isinstance(logits, torch.Tensor) and logits.dim() > 1:
        _check(logits, targets)
    is_real = targets.is_floating_point() or targets.is_complex()
    try:
        return F.cross_entropy(logits, targets if is_real else targets.long(), reduction="none")  # type: ignore[arg-type]
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ResnetPathsError(
            "targets",
            f"{targets.dtype} {list(targets.shape)}",
            "what cross-entropy takes with the network's logits",
            f"It answered: {error}",
        ) from error


def checked_losses(loss: Loss, outputs: object, targets: object) -> torch.Tensor:
    """Losses of each example; what the loss raises names it.

    Args:
        loss: From outputs and targets to losses [batch].
        outputs: What the network returns.
        targets: As for the loss.

    Returns:
        Losses [batch].

    Raises:
        ResnetPathsError: If the loss raises, or returns numbers without a gradient for outputs that have one.
        OutOfMemoryError: If the loss raises it.
    """
    name = getattr(loss, "__name__", type(loss).__name__)
    try:
        losses = loss(outputs, targets)
    except (ResnetPathsError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ResnetPathsError(
            "loss", name, "a function of outputs and targets", f"It raised {type(error).__name__}: {error}"
        ) from error
    has_gradient = isinstance(outputs, torch.Tensor) and outputs.requires_grad
    if has_gradient and isinstance(losses, torch.Tensor) and not losses.requires_grad:
        raise ResnetPathsError(
            "loss", name, "a loss with a gradient", "It does not depend on the outputs, or detaches them."
        )
    return losses


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Refuse targets that cross-entropy would read as something else."""
    num_classes = logits.shape[1]
    if num_classes == 1:
        raise ResnetPathsError("loss", None, "a loss for the one logit that the network returns", _ONE_LOGIT)
    if targets.is_floating_point():
        sums = targets.detach().float().sum(1) if targets.dim() > 1 else None
        tolerance = 1e-3 if targets.dtype.itemsize > 2 else 2e-2
        if sums is None or not bool((targets >= 0).all()) or not bool(((sums - 1).abs() <= tolerance).all()):
            raise ResnetPathsError(
                "targets",
                f"{targets.dtype} {list(targets.shape)}",
                "class indices [batch], integers, or class probabilities, which are not negative and sum to 1",
                _SQUARED_ERROR,
            )
    elif not targets.is_complex() and targets.numel():
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= num_classes:
            raise ResnetPathsError(
                "targets",
                sorted({lowest, highest}),
                f"class indices from 0 to {num_classes - 1}",
                "Leave out examples that a negative label, such as -100, marks as not to be counted.",
            )

"""What instruments read of the output: one number of each example that is split, or the logits of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from resnet_paths._utils.arguments import require_function
from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError, nearest_names

__all__ = [
    "OUTPUTS",
    "Logits",
    "Output",
    "class_logits",
    "name_of",
    "output_at",
    "output_function",
    "predicted_classes",
    "require_predictions",
]

OUTPUTS = ("margin", "logit", "log_probability")
"""Names of outputs."""

Output: TypeAlias = "str | Callable[[torch.Tensor], torch.Tensor]"
"""A name of `OUTPUTS`, or a function from outputs to one number per example."""

Logits: TypeAlias = Callable[[Any], torch.Tensor]
"""From the output of a chain to logits [batch, ..., class]."""


def output_function(output: Output, targets: object) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that an `output` stands for.

    Args:
        output: ``"margin"``, ``"logit"``, ``"log_probability"``, or a function from outputs to one number per example.
        targets: Class indices [batch]; None for the predicted class. Functions do not read them.

    Returns:
        From outputs [batch, class] to numbers [batch].

    Raises:
        ResnetPathsError: If `output` is unknown.
    """
    if not isinstance(output, str) or output not in OUTPUTS:
        names = nearest_names(str(output), OUTPUTS, cutoff=0)
        require_function("output", output, f"a function, or one of {names}")
    if callable(output):
        return output
    return lambda logits: output_at(output, targets, logits)(logits)


def output_at(output: Output, targets: object, outputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that an `output` stands for, with the classes that it compares held.

    Args:
        output: As for `output_function`.
        targets: Likewise.
        outputs: The outputs from which predicted class and runner-up are taken, [batch, class].

    Returns:
        From outputs [batch, class] to numbers [batch].
    """
    if callable(output):
        return output
    chosen = _classes(outputs, targets)[:, None]
    if output == "log_probability":
        return lambda logits: logits.log_softmax(1).gather(1, chosen)[:, 0]
    if output == "logit":
        return lambda logits: logits.gather(1, chosen)[:, 0]
    runner_up = outputs.detach().scatter(1, chosen, -torch.inf).argmax(1, keepdim=True)
    return lambda logits: logits.gather(1, chosen)[:, 0] - logits.gather(1, runner_up)[:, 0]


def class_logits(logits: object, size: int) -> torch.Tensor:
    """Logits as a float64 tensor with a dimension of positions.

    Args:
        logits: What a caller's function returns, [batch, ..., class].
        size: Number of examples.

    Returns:
        [batch, position, class]; a single position if the outputs have none.

    Raises:
        ResnetPathsError: If they are not logits of two or more classes for every example.
    """
    if not isinstance(logits, torch.Tensor) or logits.dim() < 2 or len(logits) != size or logits.shape[-1] < 2:
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ResnetPathsError(
            "logits",
            found,
            f"logits of two or more classes for every example, [{size}, ..., class]",
            "Pass logits=lambda outputs: ... where the network returns something else.",
        )
    return wide(logits.reshape(size, -1, logits.shape[-1]))


def predicted_classes(logits: torch.Tensor) -> torch.Tensor:
    """The class with the largest logit.

    Args:
        logits: From `class_logits`; minus infinity for classes that a network masks.

    Returns:
        Class indices [batch, position]; -1, which is no class, where the largest logit is NaN or infinite.
    """
    return torch.where(torch.isfinite(logits.amax(2)), logits.argmax(2), -1)


def require_predictions(logits: torch.Tensor) -> torch.Tensor:
    """The classes that a whole network predicts.

    Args:
        logits: As for `predicted_classes`.

    Returns:
        Likewise.

    Raises:
        ResnetPathsError: If there is no class.
    """
    predicted = predicted_classes(logits)
    if bool((predicted < 0).any()):
        raise ResnetPathsError(
            "inputs",
            "NaN or infinity in the logits of the network",
            "inputs whose logits are finite, or minus infinity for classes that are masked",
            "In half precision, large activations overflow: try float32.",
        )
    return predicted


def name_of(output: Output) -> str:
    """The name of an output, for the attributes of a frame."""
    return output if isinstance(output, str) else getattr(output, "__name__", "function")


def _classes(logits: torch.Tensor, targets: object) -> torch.Tensor:
    """The class of each example: its target, or what is predicted."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ResnetPathsError(
            "output",
            f"outputs {list(logits.shape)}",
            "a function where the network does not return the logits [batch, class] of two or more classes",
            "Pass output=lambda outputs: ..., such as outputs[:, -1, token] for one logit of a language model.",
        )
    if targets is None:
        return logits.argmax(1)
    real = isinstance(targets, torch.Tensor) and (targets.is_floating_point() or targets.is_complex())
    if not isinstance(targets, torch.Tensor) or real or targets.shape != logits.shape[:1]:
        found = (
            f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, torch.Tensor) else type(targets).__name__
        )
        raise ResnetPathsError("targets", found, f"class indices [{len(logits)}], or None for the predicted class")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        limits = sorted({int(targets.min()), int(targets.max())})
        raise ResnetPathsError("targets", limits, f"class indices from 0 to {logits.shape[1] - 1}")
    return targets.long()

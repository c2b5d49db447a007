"""Whether the measures of a study can be taken of what a chain returned."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.lesions.measures import IGNORED, Measure

__all__ = ["validate_logits", "validate_outputs"]


def validate_logits(logits: object, labels: torch.Tensor | None) -> int:
    """Validate logits and labels.

    Args:
        logits: What a chain returned: [batch, class], [batch, position, class] or [batch, class, ...].
        labels: Class indices [batch] or [batch, ...], -100 where an item does not count; or None.

    Returns:
        The dimension of the classes: where the shapes of the labels allow two, the last of three, else the second.

    Raises:
        ResnetPathsError: If the logits are not such a tensor, of one class alone, or the labels are not among their
            classes.
    """
    if not isinstance(logits, torch.Tensor):
        raise ResnetPathsError("chain", f"a chain that returns a {type(logits).__name__}", "logits [batch, class]")
    preferred = (2, 1) if logits.dim() == 3 else (1, logits.dim() - 1)
    if labels is None and logits.dim() > 1:
        return _of_several_classes(logits, preferred[0])
    if labels is not None and (labels.is_floating_point() or labels.dim() != logits.dim() - 1 == 1):
        raise ResnetPathsError(
            "labels",
            f"{labels.dtype} {list(labels.shape)}",
            "class indices, integers [batch]"
            + (", or [batch, ...] with one for each item" if logits.dim() > 2 else ""),
            "Values are compared by measures=('mean_squared_error',).",
        )
    shape = [] if labels is None else list(labels.shape)
    fitting = [dim for dim in preferred if [*logits.shape[:dim], *logits.shape[dim + 1 :]] == shape]
    if not fitting or labels is None:
        raise ResnetPathsError(
            "loader", f"labels {shape} for logits {list(logits.shape)}", "one label per row of logits"
        )
    num_classes = logits.shape[_of_several_classes(logits, fitting[0])]
    known = labels != IGNORED
    if bool((known & ((labels < 0) | (labels >= num_classes))).any()):
        shown = labels[known]
        raise ResnetPathsError(
            "labels", [int(shown.min()), int(shown.max())], f"class indices from 0 to {num_classes - 1}, or {IGNORED}"
        )
    return fitting[0]


def validate_outputs(measures: Iterable[Measure], outputs: object, labels: torch.Tensor | None) -> None:
    """Validate that measures can be taken of what a chain returned.

    Args:
        measures: The measures.
        outputs: What the chain returned.
        labels: Labels of the batch; None for a batch without labels.

    Raises:
        ResnetPathsError: If the outputs are not one tensor, labels are missing, or they do not fit the outputs.
    """
    if not isinstance(outputs, torch.Tensor):
        raise ResnetPathsError("chain", f"a chain that returns a {type(outputs).__name__}", "one tensor [batch, ...]")
    for measure in measures:
        if measure.reads and labels is None:
            raise ResnetPathsError(
                "loader",
                "a batch without labels",
                f"batches of (inputs, labels), which {measure.name!r} reads",
                "Without labels there are measures=('agreement', 'kl_divergence').",
            )
        if measure.reads == "classes" or (measure.reads_intact and measure.key == ""):
            validate_logits(outputs, labels if measure.reads else None)


def _of_several_classes(logits: torch.Tensor, dim: int) -> int:
    if logits.shape[dim] == 1:
        raise ResnetPathsError(
            "measures",
            f"classes of logits {list(logits.shape)}",
            "a measure for the one logit that the network returns",
            "Pass a function, such as one that returns (outputs.flatten() > 0) != labels.flatten().",
        )
    return dim

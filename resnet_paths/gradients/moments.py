"""Mean and variance of path length as the gradient weighs it, without the whole split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from resnet_paths._utils.arguments import require_int
from resnet_paths._utils.statistics import mean_over_examples
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import InputsOrLoader, batches_with_bar
from resnet_paths.gradients.losses import Loss
from resnet_paths.gradients.points import Place

__all__ = ["PathLengthMoments", "path_length_moments"]


@dataclass(frozen=True)
class PathLengthMoments:
    """Moments of the path length, each weighed by ``gradient_share``.

    Attributes:
        mean: The sum over lengths k of k times the share.
        mean_se: Its standard error over examples; NaN for a single one.
        variance: The sum of ``(k - mean)^2`` times the share; it may be negative, since shares may be.
        variance_se: Its standard error over examples.
        num_examples: Examples whose gradient is not 0.
    """

    mean: float
    mean_se: float
    variance: float
    variance_se: float
    num_examples: int


@torch.inference_mode(False)
def path_length_moments(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: object = None,
    *,
    loss: Loss | None = None,
    with_respect_to: str | int = "input",
    memory_budget: int = 2**31,
    progress: bool = True,
) -> PathLengthMoments:
    """Mean and variance of path length as the gradient weighs it, from three block VJPs for each block.

    They are those of ``gradient_share`` from `resnet_paths.gradient_by_path_length`, which takes n (n + 1) / 2 block
    VJPs. With a factor ``t = 1 + x`` on every branch, the gradient is a polynomial in x whose coefficients up to the
    second order are carried from block to block.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`.
        targets: What `loss` takes in addition to the logits.
        loss: From (logits, targets) to a loss for each example; cross-entropy if None.
        with_respect_to: ``"input"``, ``"stem"``, or a block, for its output.
        memory_budget: Bytes that cotangents and kept activations may take.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        The moments.

    Raises:
        ResnetPathsError: As `resnet_paths.gradient_by_path_length`.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(4)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.constant_(layer.weight, 0.1)
        >>> blocks = [Block(layer, torch.nn.Identity(), name=f"block{i}") for i, layer in enumerate(layers)]
        >>> chain = ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity())
        >>> moments = path_length_moments(chain, torch.ones(2, 3), loss=lambda y, _: y.sum(1))
        >>> round(moments.mean, 4), round(4 * 0.3 / 1.3, 4)  # a binomial with odds 0.3
        (0.9231, 0.9231)
        >>> round(moments.variance, 4), round(4 * 0.3 / 1.3**2, 4)
        (0.7101, 0.7101)
    """
    place = Place.of_states(chain, with_respect_to)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    found = [
        point.moments()
        for batch_inputs, batch_targets in batches_with_bar("path length", inputs, targets, progress)
        for point in place.points(batch_inputs, batch_targets, loss, memory_budget, 3)
    ]
    _, first, second = np.concatenate(found, 1)
    (mean, pairs), (mean_se, _) = mean_over_examples(np.stack([first, second]))
    # The mean over examples of (k - mean)^2, each by its own shares, to first order in the mean.
    squares = 2 * second + first - 2 * mean * first
    return PathLengthMoments(
        float(mean),
        float(mean_se),
        float(2 * pairs + mean - mean**2),
        float(mean_over_examples(squares)[1]),
        int(np.isfinite(first).sum()),
    )

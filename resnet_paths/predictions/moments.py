"""Mean and variance of path length as the prediction weighs it, without the whole split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from resnet_paths._utils.arguments import require_int
from resnet_paths.core.chain import ResidualChain, require_chain
from resnet_paths.core.inputs import InputsOrLoader
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.predictions.detached import linearizer_of
from resnet_paths.predictions.outputs import Output, output_function
from resnet_paths.predictions.shares import checked_residual
from resnet_paths.predictions.sources import all_contributions, sources_of

__all__ = ["PredictionPathLengthMoments", "prediction_path_length_moments"]


@dataclass(frozen=True)
class PredictionPathLengthMoments:
    """Moments of the path length, each weighed by ``share`` of `resnet_paths.prediction_by_path_length`.

    Attributes:
        mean: The sum over lengths k of k times the share; NaN if the outputs sum up to 0.
        mean_se: Its standard error over examples, to first order; NaN for a single one. It is large where the outputs
            of the examples nearly cancel.
        variance: The sum of ``(k - mean)^2`` times the share; it may be negative, since shares may be.
        variance_se: Its standard error over examples, to first order.
        num_examples: Number of examples.
        mean_output: Mean of the output that is split.
        residual: The largest difference between the sum of an example's contributions and its output.
    """

    mean: float
    mean_se: float
    variance: float
    variance_se: float
    num_examples: int
    mean_output: float
    residual: float


@torch.inference_mode(False)
def prediction_path_length_moments(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: torch.Tensor | None = None,
    *,
    output: Output = "margin",
    linearization: str = "tangent",
    memory_budget: int = 2**31,
    progress: bool = True,
) -> PredictionPathLengthMoments:
    """Mean and variance of path length as the prediction weighs it, from three block VJPs for each block.

    They are those of ``share`` from `resnet_paths.prediction_by_path_length`, which takes n (n + 1) / 2 block VJPs. At
    fixed affine maps of all parts the output is a polynomial in a factor ``t`` on every branch, its constants included,
    whose coefficient of ``t^k`` is the contribution of length k. With ``t = 1 + x``, the coefficients up to the second
    order in x are carried from block to block.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`.
        targets: Class indices [batch]; None for the predicted class, and with a loader, whose labels are the targets.
        output: As for `resnet_paths.prediction_by_path_length`.
        linearization: ``"tangent"`` or ``"detached"``, as for `resnet_paths.prediction_by_path_length`.
        memory_budget: Bytes that stacks of cotangents and kept activations may take; batches are split to fit.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        The moments.

    Raises:
        ResnetPathsError: As `resnet_paths.prediction_by_path_length`.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layers = [torch.nn.Linear(3, 3) for _ in range(2)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.constant_(layer.weight, 0.1), torch.nn.init.constant_(layer.bias, 1.0)
        >>> blocks = [Block(layer, torch.nn.Identity(), name=f"block{i}") for i, layer in enumerate(layers)]
        >>> chain = ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity())
        >>> moments = prediction_path_length_moments(chain, torch.ones(2, 3), output=lambda y: y.sum(1))
        >>> round(moments.mean, 4), round((7.8 + 2 * 1.17) / 11.97, 4)  # contributions 3, 7.8 and 1.17
        (0.8471, 0.8471)
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    linearizer, _ = linearizer_of(linearization)
    output_function(output, None)  # validated before the first pass
    memory_budget = require_int("memory_budget", memory_budget, 1)
    outputs, values = all_contributions(
        chain, inputs, targets, output, sources_of(chain, False), 3, linearizer, memory_budget, progress, moments=True
    )
    residual = checked_residual(chain, outputs, values[:, 0])
    _, first, pairs = values.sum(0)
    squares = 2 * pairs + first
    with np.errstate(divide="ignore", invalid="ignore"):
        total = outputs.sum()
        mean, mean_square = first.sum() / total, squares.sum() / total
        of_mean = (first - mean * outputs) / total  # what each example adds, to first order
        of_variance = (squares - mean_square * outputs) / total - 2 * mean * of_mean
        num = len(outputs)
        factor = num / (num - 1) if num > 1 else np.nan
        mean_se, variance_se = np.sqrt(np.square([of_mean, of_variance]).sum(1) * factor)
    return PredictionPathLengthMoments(
        float(mean),
        float(mean_se),
        float(mean_square - mean**2),
        float(variance_se),
        num,
        float(outputs.mean()),
        residual,
    )

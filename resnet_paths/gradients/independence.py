"""The distribution of path length, compared with that of independent blocks.

The shares <g_S, G> / <G, G> of single paths are a signed measure of total 1 on the sets S of blocks. Were it a product
measure, with the share p_i of the gradient through the branch of block i as its margins, path length would have the
Poisson binomial distribution of p_1, ..., p_n. The covariance of two blocks is that of their indicators under the
measure: p_ij - p_i p_j, with the share p_ij of the paths that take both branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import optimize

from resnet_paths._utils.arguments import require_float, require_frame, require_int, require_list
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import mean_over_examples
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import InputsOrLoader, batches_with_bar
from resnet_paths.gradients.losses import Loss
from resnet_paths.gradients.points import Place, Point

__all__ = [
    "BlockIndependence",
    "block_independence",
    "branch_probabilities",
    "pair_covariances",
    "poisson_binomial",
]


def poisson_binomial(probabilities: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """The distribution of the number of branches taken if they are taken independently.

    Args:
        probabilities: Of each branch; shares of the gradient may lie outside [0, 1], and so may the result.

    Returns:
        The probability of 0, 1, ..., n branches, float64 [n + 1].

    Raises:
        ResnetPathsError: If a probability is not a finite number.

    Example:
        >>> poisson_binomial([0.5, 0.5]).tolist()
        [0.25, 0.5, 0.25]
    """
    allowed = "a list of finite numbers"
    values = [require_float("probabilities", p, allowed) for p in require_list("probabilities", probabilities, allowed)]
    law = np.ones(1)
    for p in values:
        law = np.convolve(law, [1 - p, p])
    return law


@dataclass(frozen=True)
class BlockIndependence:
    """The distribution of path length, compared with that of independent blocks.

    Attributes:
        laws: One row for each path length: ``path_length``; ``gradient_share``; ``independent``, the Poisson binomial
            distribution; ``interacting``, proportional to ``independent * exp(b k + interaction k^2)``.
        total_variation: Half of the sum of absolute differences of ``gradient_share`` and ``independent``.
        total_variation_interacting: Of ``gradient_share`` and ``interacting``.
        variance_ratio: Variance of path length over that of independent blocks; above 1 where branches tend to be taken
            together.
        interaction: The number for which ``interacting`` has the variance that ``gradient_share`` has; b keeps the
            mean. NaN where a share through a branch is outside [0, 1].
    """

    laws: pd.DataFrame
    total_variation: float
    total_variation_interacting: float
    variance_ratio: float
    interaction: float


def block_independence(split: pd.DataFrame, through: pd.DataFrame) -> BlockIndependence:
    """Comparison of the distribution of path length with that of independent blocks.

    Args:
        split: From `resnet_paths.gradient_by_path_length`, of all lengths.
        through: From `resnet_paths.gradient_through_block`, for the same examples and place; no branch may hold a chain
            of its own.

    Returns:
        The comparison.

    Raises:
        ResnetPathsError: If columns are missing, or the mean path length is not the sum of the shares through blocks,
            as of other examples.

    Example:
        >>> split = pd.DataFrame({"path_length": [0, 1, 2], "gradient_share": [0.5, 0.0, 0.5]})
        >>> through = pd.DataFrame({"gradient_share_through_branch": [0.5, 0.5]})
        >>> found = block_independence(split, through)
        >>> found.variance_ratio, found.total_variation
        (2.0, 0.5)
    """
    require_frame("split", split, ["path_length", "gradient_share"])
    require_frame("through", through, ["gradient_share_through_branch"])
    probabilities = through["gradient_share_through_branch"].to_numpy(dtype=float)
    independent = poisson_binomial(probabilities)
    lengths = np.arange(len(independent))
    shares = split.set_index("path_length")["gradient_share"].reindex(lengths, fill_value=0.0).to_numpy(dtype=float)
    mean = float(lengths @ shares)
    if abs(mean - probabilities.sum()) > 1e-3 * max(1.0, abs(mean)) or split["path_length"].max() > lengths[-1]:
        raise ResnetPathsError(
            "through",
            f"shares that sum to {probabilities.sum():.4g}",
            f"those of the same examples and place as split, whose mean path length is {mean:.4g}",
            "Take both from one loader, without max_length; branches with chains of their own have no such sum.",
        )
    variance = float((lengths - mean) ** 2 @ shares)
    interaction, interacting = _interacting(independent, mean, variance)
    laws = pd.DataFrame({
        "path_length": lengths,
        "gradient_share": shares,
        "independent": independent,
        "interacting": interacting,
    })
    return BlockIndependence(
        laws,
        float(abs(shares - independent).sum() / 2),
        float(abs(shares - interacting).sum() / 2),
        float(variance / (probabilities * (1 - probabilities)).sum()),
        interaction,
    )


def _interacting(law: np.ndarray, mean: float, variance: float) -> tuple[float, np.ndarray]:
    """The quadratic tilt of a law that has this mean and variance, and what the tilt makes of it."""
    lengths = np.arange(len(law))
    if (law < 0).any() or not variance > 0:
        return np.nan, np.full(len(law), np.nan)
    x = (lengths - mean) / np.sqrt(variance)
    logs = np.log(np.where(law > 0, law, np.finfo(float).tiny))

    def dual(tilt: np.ndarray) -> tuple[float, np.ndarray]:
        """Convex; its minimum has mean 0 and variance 1 in x."""
        tilted = logs + tilt[0] * x + tilt[1] * x**2
        total = np.logaddexp.reduce(tilted)
        weights = np.exp(tilted - total)
        return float(total - tilt[1]), np.array([weights @ x, weights @ x**2 - 1])

    found = optimize.minimize(dual, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-10})
    tilted = logs + found.x[0] * x + found.x[1] * x**2
    return float(found.x[1] / variance), np.exp(tilted - np.logaddexp.reduce(tilted))


@torch.inference_mode(False)
def branch_probabilities(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: object = None,
    *,
    power: float = 2.0,
    loss: Loss | None = None,
    with_respect_to: str | int = "input",
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """The probability of the branch of each block on a path, from one ordinary backward pass.

    With v the whole gradient after the addition, J the Jacobian of the branch and P that of the skip, the odds of the
    branch are ``(|J^T v| / |P^T v|)^power``. `poisson_binomial` of them predicts, without any fit, at which lengths the
    energy of paths is (power 2) or their total magnitude (power 1).

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`.
        targets: What `loss` takes in addition to the logits.
        power: Of the ratio of norms.
        loss: From (logits, targets) to a loss for each example; cross-entropy if None.
        with_respect_to: ``"input"``, ``"stem"``, or a block, for its output.
        memory_budget: Bytes that cotangents and kept activations may take.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        One row per block above the place, first to last: ``block_index``, ``block`` (name), ``stage``; ``probability``,
        the mean over examples of odds / (1 + odds), with its standard error ``probability_se``. It is 1 without a skip,
        0 without a branch.

    Raises:
        ResnetPathsError: As `resnet_paths.gradient_by_path_length`.
    """
    place = Place.of_states(chain, with_respect_to)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    power = require_float("power", power, "a number above 0", math.ulp(0.0))
    found = [
        _probabilities(point, power)
        for batch_inputs, batch_targets in batches_with_bar("branches", inputs, targets, progress)
        for point in place.points(batch_inputs, batch_targets, loss, memory_budget, 1)
    ]
    mean, error = mean_over_examples(np.concatenate(found, 1))
    indices = range(place.down_to, len(chain))
    return pd.DataFrame({
        "block_index": indices,
        "block": [chain[i].name for i in indices],
        "stage": [chain[i].stage for i in indices],
        "probability": mean,
        "probability_se": error,
    })


def _probabilities(point: Point, power: float) -> np.ndarray:
    """[block, batch]."""
    rows = []
    for block, offered in zip(point.place.above, point.gains(), strict=True):
        logs = power * np.stack([norms.numpy() for norms, _ in offered])
        weights = np.exp(logs - logs.max(0))
        rows.append(weights[block.skip is not None :].sum(0) / weights.sum(0))
    return np.array(rows).reshape(len(rows), point.num_examples)


@torch.inference_mode(False)
def pair_covariances(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: object = None,
    *,
    loss: Loss | None = None,
    with_respect_to: str | int = "input",
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """Covariance of each pair of blocks: whether paths that take one branch take the other more often, or less.

    With p_i the share of the gradient through the branch of block i and p_ij that through the branches of both, the
    covariance is p_ij - p_i p_j; of a block with itself, p_i (1 - p_i). Where no branch holds a chain of its own, all
    of them, each pair counted twice, add up to the variance of path length. They take one backward pass of n block VJPs
    and n (n + 1) / 2 Jacobian-vector products.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`.
        targets: What `loss` takes in addition to the logits.
        loss: From (logits, targets) to a loss for each example; cross-entropy if None.
        with_respect_to: ``"input"``, ``"stem"``, or a block, for its output.
        memory_budget: Bytes that stacks of tangents and kept activations may take; batches are split to fit.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        One row per pair of blocks above the place, and per block with itself: ``first``, ``second`` (positions, the
        first at most the second), ``first_block``, ``second_block`` (names), ``first_stage``, ``second_stage``;
        ``gradient_share_through_both``, the mean over examples, and ``covariance``, that of the mean shares; each with
        a standard error over examples, ``..._se``, to first order (NaN for a single example).

    Raises:
        ResnetPathsError: As `resnet_paths.gradient_by_path_length`.
    """
    place = Place.of_states(chain, with_respect_to)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    found = [
        point.shares_through_pairs()
        for batch_inputs, batch_targets in batches_with_bar("pairs of blocks", inputs, targets, progress)
        for point in place.points(batch_inputs, batch_targets, loss, memory_budget, len(chain) + 1)
    ]
    each = np.concatenate(found, 2)
    rows, columns = np.triu_indices(len(each))
    of_pairs, of_blocks = each[rows, columns], each[np.arange(len(each)), np.arange(len(each))]
    both, both_se = mean_over_examples(of_pairs)
    means = np.nanmean(of_blocks, 1) if of_blocks.size else of_blocks.sum(1)
    one, other = means[rows], means[columns]
    influences = of_pairs - one[:, None] * of_blocks[columns] - other[:, None] * of_blocks[rows]
    indices = np.arange(place.down_to, len(chain))
    frame = pd.DataFrame({"first": indices[rows], "second": indices[columns]})
    for name in ("first", "second"):
        frame[f"{name}_block"] = [chain[i].name for i in frame[name]]
        frame[f"{name}_stage"] = [chain[i].stage for i in frame[name]]
    frame["gradient_share_through_both"], frame["gradient_share_through_both_se"] = both, both_se
    frame["covariance"], frame["covariance_se"] = both - one * other, mean_over_examples(influences)[1]
    return frame

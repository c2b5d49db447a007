"""Statistics of contributions: means with standard errors, shares of a total with bootstrap intervals, the residual."""

from __future__ import annotations

import numpy as np
import torch

from resnet_paths._utils.arguments import seeded_generator
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.statistics import mean_over_examples
from resnet_paths.core.chain import ResidualChain

__all__ = ["checked_residual", "pooled_share", "share_columns"]

_NUM_RESAMPLES = 1000


def checked_residual(chain: ResidualChain, outputs: np.ndarray, values: np.ndarray) -> float:
    """The largest difference between the sum of an example's contributions and its output.

    Args:
        chain: The chain, whose dtype and number of blocks determine the tolerance: every block rounds once more. In
            half precision that alone would allow anything; a tenth of what is added up is the most.
        outputs: The output of each example, [example].
        values: Contributions [row, example].

    Returns:
        The difference.

    Raises:
        ResnetPathsError: If it is larger than rounding explains.
    """
    residuals = np.abs(values.sum(0) - outputs)
    dtypes = [p.dtype for p in chain.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)
    tolerance = min(32 * (8 + len(chain)) * eps, 0.1)
    allowed = tolerance * np.maximum(np.abs(values).sum(0), np.abs(outputs))
    if not (residuals <= allowed).all():
        worst = int(np.argmax(residuals - allowed))
        raise ResnetPathsError(
            "chain",
            f"contributions that differ from the output of example {worst} by {residuals[worst]:.3g}",
            f"a difference of at most {allowed[worst]:.3g}, which rounding explains",
            "Convert a copy of the chain and the inputs to float64.",
        )
    return float(residuals.max())


def pooled_share(
    values: np.ndarray, totals: np.ndarray, generator: torch.Generator | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sum of values over the sum of totals, with a 95 % interval over examples (bootstrap percentiles).

    Args:
        values: Array [row, example].
        totals: Array [row, example], or [example] for all rows.
        generator: Source of the random numbers; None for a new one, seeded with 0.

    Returns:
        Shares, and lower and upper ends of their intervals, [row]. The ends are NaN for a single example, and where
        the sign of the total is uncertain, so that any share is possible: more than 2.5 % of the resampled totals have
        the other sign.
    """
    num = values.shape[1]
    low, high = np.full((2, len(values)), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = values.sum(1) / totals.sum(-1)
        if num > 1:
            generator = seeded_generator("generator", generator)
            drawn = torch.randint(num, (_NUM_RESAMPLES, num), generator=generator, device=generator.device).cpu()
            counts = torch.zeros(_NUM_RESAMPLES, num, dtype=torch.float64)
            counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
            sums = counts.numpy() @ (totals if totals.ndim > 1 else totals[None]).T
            low, high = np.quantile((counts.numpy() @ values.T) / sums, [0.025, 0.975], axis=0)
            is_certain = np.maximum((sums > 0).mean(0), (sums < 0).mean(0)) >= 0.975
            low, high = np.where(is_certain, low, np.nan), np.where(is_certain, high, np.nan)
    return share, low, high


def share_columns(
    values: np.ndarray, outputs: np.ndarray, generator: torch.Generator | None, name: str = "contribution"
) -> dict[str, np.ndarray]:
    """Columns of a frame for what adds up to the outputs.

    Args:
        values: Contributions [row, example].
        outputs: The output of each example, [example].
        generator: As for `pooled_share`.
        name: Name of a contribution.

    Returns:
        `name`, the mean over examples, and its standard error; ``share`` of the outputs with its interval; mean
        absolute values.
    """
    mean, error = mean_over_examples(values)
    share, low, high = pooled_share(values, outputs, generator)
    return {
        name: mean,
        f"{name}_se": error,
        "share": share,
        "share_low": low,
        "share_high": high,
        f"mean_absolute_{name}": np.abs(values).mean(1),
    }

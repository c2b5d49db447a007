"""Which path lengths carry the gradient: the effective window, and the decay that explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from resnet_paths._utils.arguments import require_float, require_frame, require_int, require_list
from resnet_paths._utils.errors import ResnetPathsError, nearest_names

__all__ = ["PAPER_WINDOW", "EffectiveWindow", "GeometricDecay", "decay_factors", "effective_window", "fit_decay"]

PAPER_WINDOW = (5, 17)
"""Veit et al. 2016, section 4.3: "almost all of the gradient updates" of their 54 blocks come from these lengths."""


_Z = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class EffectiveWindow:
    """The shortest range of path lengths that holds a share of a quantity.

    Attributes:
        quantity: The column that was summed.
        shortest: First length of the window.
        longest: Last length of the window.
        share: Share of the column's sum in the window; at least the one required.
        peak: The length where the column is largest.
        fraction_of_paths: Number of paths with a length in the window over the number of all paths; NaN where the frame
            does not tell how many there are.
    """

    quantity: str
    shortest: int
    longest: int
    share: float
    peak: int
    fraction_of_paths: float


def effective_window(frame: pd.DataFrame, quantity: str, share: float = 0.95) -> EffectiveWindow:
    """The shortest range of path lengths that holds a share of a quantity; among equally short ones that with the most.

    The paper's own window is `PAPER_WINDOW`, for ``total_gradient_magnitude`` (Veit et al. 2016, figure 6c).

    Args:
        frame: From `resnet_paths.gradient_by_path_length` or `resnet_paths.path_histogram`, a row for each path length.
            The number of all paths is in the ``attrs`` of the former, which a CSV file does not keep, and follows from
            ``fraction`` of the latter.
        quantity: A column; it may hold negative numbers, as ``gradient_share`` does.
        share: Of the column's sum, in (0, 1].

    Returns:
        The window.

    Raises:
        ResnetPathsError: If there is no such column, it holds NaN or does not add up to a positive number, a path
            length occurs twice, or `share` is out of range.

    Example:
        >>> from resnet_paths import path_histogram
        >>> window = effective_window(path_histogram(54), "fraction")
        >>> window.shortest, window.longest, window.peak
        (20, 34, 27)
    """
    frame = _by_length(frame, quantity, "num_paths")
    values = frame[quantity].to_numpy(dtype=float)
    allowed = "a number above 0 and at most 1"
    if not 0 < require_float("share", share, allowed) <= 1:
        raise ResnetPathsError("share", share, allowed)
    total = math.fsum(values)
    if not np.isfinite(values).all() or not total > 0:
        raise ResnetPathsError("quantity", quantity, "a column of finite numbers with a positive sum")
    sums = np.concatenate([[0.0], np.cumsum(values)]) / total
    # The last float below the share counts as reached: sums of shares end at 1 only up to rounding.
    enough = share - 1e-12
    for width in range(1, len(values) + 1):
        held = sums[width:] - sums[:-width]
        if held.max() >= enough:
            first = int(held.argmax())
            break
    else:
        raise ResnetPathsError("share", share, f"at most {sums.max():.6g}, which is all that the lengths hold")
    lengths = frame["path_length"].to_numpy()
    inside = frame.iloc[first : first + width]
    if "total_num_paths" in frame.attrs:
        fraction = sum(map(int, inside["num_paths"])) / int(frame.attrs["total_num_paths"])
    else:  # the rows may end at max_length: they are no total
        fraction = float(inside["fraction"].sum()) if "fraction" in frame else math.nan
    return EffectiveWindow(
        quantity,
        int(lengths[first]),
        int(lengths[first + width - 1]),
        float(held.max()),
        int(lengths[int(np.argmax(values))]),
        fraction,
    )


@dataclass(frozen=True)
class GeometricDecay:
    """Norms that fall by one factor with each block: ``m(k) = m(0) rate^k``.

    Attributes:
        rate: The factor r.
        rate_se: Its standard error, from the scatter of the points about the line.
        longest_path: Number n of blocks on the longest path.
    """

    rate: float
    rate_se: float
    longest_path: int

    @property
    def binomial(self) -> pd.DataFrame:
        """What r makes of the total magnitude: C(n, k) r^k is proportional to Binomial(n, r / (1 + r)).

        Columns ``path_length`` and ``fraction``.
        """
        lengths = np.arange(self.longest_path + 1)
        odds = self.rate / (1 + self.rate)
        return pd.DataFrame({"path_length": lengths, "fraction": stats.binom.pmf(lengths, self.longest_path, odds)})


def fit_decay(
    frame: pd.DataFrame, quantity: str = "mean_path_gradient_norm", lengths: tuple[int, int] | None = None
) -> GeometricDecay:
    """A geometric decay fitted to norms by path length: the straight line of Veit et al. 2016, figure 6b, log axis.

    The standard error is that of the line's slope. It does not show whether the norms are on a line: if they are not,
    as in a trained ResNet-110, use `decay_factors` for the factor at each length.

    Args:
        frame: From `resnet_paths.gradient_by_path_length`.
        quantity: A column of norms of single paths; its standard errors weigh the points where the frame has them, and
            points without one among them are left out.
        lengths: First and last length of the fit; None for all. Norms of 0 are left out.

    Returns:
        The decay.

    Raises:
        ResnetPathsError: If there is no such column, a path length occurs twice, or there are fewer than four points.

    Example:
        >>> frame = pd.DataFrame({"path_length": range(10), "num_paths": 1, "norm": [3 * 0.25**k for k in range(10)]})
        >>> round(fit_decay(frame, "norm").rate, 6)
        0.25
    """
    frame = _by_length(frame, quantity)
    values, k = frame[quantity].to_numpy(dtype=float), frame["path_length"].to_numpy()
    if lengths is None:
        first, last = int(k[0]), int(k[-1])
    else:
        allowed = "a pair of path lengths, the first and the last of the fit, or None"
        pair = [require_int("lengths", length, 0) for length in require_list("lengths", lengths, allowed)]
        if len(pair) != 2:
            raise ResnetPathsError("lengths", lengths, allowed)
        first, last = pair
    chosen = (k >= first) & (k <= last) & (values > 0) & np.isfinite(values)
    errors = frame[f"{quantity}_se"].to_numpy(dtype=float) if f"{quantity}_se" in frame else np.zeros(len(k))
    is_weighted = bool((errors[chosen] > 0).any())
    if is_weighted:
        chosen &= ~np.isnan(errors)
    if chosen.sum() < 4:
        raise ResnetPathsError("lengths", lengths, f"a range with at least four norms above 0; it has {chosen.sum()}")
    weights = None
    if is_weighted:
        relative = errors[chosen] / values[chosen]
        # A length with a single path is known exactly: it must not outweigh all others.
        weights = 1 / np.maximum(relative, np.median(relative[relative > 0]) / 10)
    (slope, _), covariance = np.polyfit(k[chosen], np.log(values[chosen]), 1, w=weights, cov=True)
    rate = math.exp(slope)
    longest = int(frame.attrs.get("longest_path", k[-1]))
    return GeometricDecay(rate, rate * math.sqrt(max(covariance[0, 0], 0.0)), longest)


def decay_factors(frame: pd.DataFrame, quantity: str = "mean_path_gradient_norm") -> pd.DataFrame:
    """The factor by which norms fall from each path length to the next, with its error.

    Args:
        frame: From `resnet_paths.gradient_by_path_length`.
        quantity: A column of norms of single paths. Its standard errors are taken as those of independent estimates,
            such as those of paths that are drawn for each length. Paths that each example has of its own are drawn for
            all lengths together; neighbouring estimates then err alike, and the errors of factors are too large.

    Returns:
        One row for each pair of neighbouring lengths: ``path_length``, the longer one; ``factor``; ``factor_se``, to
        first order, and the ends of a 95 % interval, ``factor_low`` and ``factor_high``, symmetric in the logarithm;
        NaN where the frame has no errors, or a norm is 0.

    Raises:
        ResnetPathsError: If there is no such column, or a path length occurs twice.

    Example:
        >>> frame = pd.DataFrame({"path_length": [3, 4, 5], "norm": [8.0, 4.0, 1.0], "norm_se": [0.0, 0.4, 0.0]})
        >>> decay_factors(frame, "norm").round(3).values.tolist()
        [[4.0, 0.5, 0.05, 0.411, 0.608], [5.0, 0.25, 0.025, 0.206, 0.304]]
    """
    frame = _by_length(frame, quantity)
    values, k = frame[quantity].to_numpy(dtype=float), frame["path_length"].to_numpy()
    errors = np.full(len(k), np.nan)
    if f"{quantity}_se" in frame:
        errors = frame[f"{quantity}_se"].to_numpy(dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        factors = values[1:] / values[:-1]
        relative = np.hypot(errors[1:] / values[1:], errors[:-1] / values[:-1])
        spread = np.exp(_Z * relative)
    found = pd.DataFrame({
        "path_length": k[1:],
        "factor": factors,
        "factor_se": factors * relative,
        "factor_low": factors / spread,
        "factor_high": factors * spread,
    })
    neighbours: pd.DataFrame = found[np.diff(k) == 1].reset_index(drop=True)
    return neighbours


def _by_length(frame: pd.DataFrame, quantity: str, *others: str) -> pd.DataFrame:
    """The frame from the shortest path length to the longest; refused if it does not have one row for each."""
    require_frame("frame", frame, ["path_length", *others])
    if not isinstance(quantity, str) or quantity not in frame:
        raise ResnetPathsError("quantity", quantity, f"a column of the frame, nearest {_nearest(quantity, frame)}")
    twice = sorted(set(frame["path_length"][frame["path_length"].duplicated()]))
    if twice:
        raise ResnetPathsError(
            "frame",
            f"several rows of path length {twice[0]}",
            "one row for each path length",
            "Take one network, or one source, at a time.",
        )
    return frame.sort_values("path_length")


def _nearest(quantity: str, frame: pd.DataFrame) -> str:
    return nearest_names(quantity, map(str, frame.columns))

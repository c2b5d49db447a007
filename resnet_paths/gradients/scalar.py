"""What +x does to a gradient, in one dimension, where it can be written down.

A plain chain y_l = f(w_l y_(l-1)) multiplies the gradient by F'_l = w_l f'(w_l y_(l-1)) a layer, a residual chain
y_l = y_(l-1) + f(w_l y_(l-1)) by 1 + F'_l (He et al. 2016b, equation 5, in one dimension): the 1 is the skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from resnet_paths._utils.arguments import require_float, require_list
from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["ACTIVATIONS", "scalar_gradients"]

ACTIVATIONS = ("sigmoid", "relu")
"""What `scalar_gradients` knows."""


def scalar_gradients(weights: Iterable[float], activation: str = "sigmoid", start: float = 1.0) -> pd.DataFrame:
    """The gradient of a chain of one-dimensional layers, without and with skips: a product, factor by factor.

    Args:
        weights: The weight w_l of each layer, first to last.
        activation: f, ``"sigmoid"`` or ``"relu"``.
        start: The input y_0.

    Returns:
        One row per kind of chain and depth: ``network`` (``"plain"``, ``"residual"``); ``depth``, from 0 to the number
        of layers; ``state``, y at this depth; ``factor``, F' or 1 + F' of the layer that leads here (1 at depth 0);
        ``gradient``, the derivative of the state by the input, the product of all factors so far.

    Raises:
        ResnetPathsError: If the activation is another, or a number is not finite.

    Example:
        >>> frame = scalar_gradients([1.0] * 30)
        >>> frame.groupby("network").gradient.last().map("{:.2g}".format).to_dict()
        {'plain': '3e-20', 'residual': '1.5'}
    """
    if activation not in ACTIVATIONS:
        raise ResnetPathsError("activation", activation, " or ".join(map(repr, ACTIVATIONS)))
    given = require_list("weights", weights, "a list of finite numbers")
    weights = [float(require_float("weights", weight, "finite numbers")) for weight in given]
    start = require_float("start", start)
    rows = [
        row
        for network, skip in (("plain", 0.0), ("residual", 1.0))
        for row in _walk(network, skip, weights, activation, float(start))
    ]
    return pd.DataFrame(rows)


def _walk(
    network: str, skip: float, weights: Sequence[float], activation: str, state: float
) -> list[dict[str, str | float]]:
    factor = gradient = 1.0
    rows: list[dict[str, str | float]] = []
    for depth in range(len(weights) + 1):
        if depth:
            weight = weights[depth - 1]
            value, slope = _value_and_slope(activation, weight * state)
            factor = skip + weight * slope
            state, gradient = skip * state + value, gradient * factor
        rows.append({"network": network, "depth": depth, "state": state, "factor": factor, "gradient": gradient})
    return rows


def _value_and_slope(activation: str, z: float) -> tuple[float, float]:
    if activation == "relu":
        return max(z, 0.0), float(z > 0)
    # Of the side where exp cannot overflow.
    small = math.exp(-abs(z))
    value = (1.0 if z >= 0 else small) / (1 + small)
    return value, small / (1 + small) ** 2

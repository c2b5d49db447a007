"""Jacobian-vector products of a part with a stack of tangents, as the transpose of its pullback.

A pullback is linear in the cotangents, so that its transposed Jacobian is the Jacobian of the part. Unlike forward-mode
differentiation this works for every linearization, and for operations without a forward-mode formula.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from resnet_paths.core.backward.linearize import Pullback, unchanged

__all__ = ["differentiable_pullbacks", "pushed"]


@contextlib.contextmanager
def differentiable_pullbacks() -> Iterator[None]:
    """Context in which to linearize parts for `pushed`: the backward pass of fused attention is not differentiable.

    Yields:
        Nothing.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


def pushed(pullback: Pullback, output: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
    """The tangents of the output of a part: Jacobian-vector products.

    Args:
        pullback: Transposed Jacobian of the part, from a linearization within `differentiable_pullbacks`.
        output: Output of the part at the point, [batch, ...].
        tangents: Tangents of its input, [K, *state.shape].

    Returns:
        Tangents of the output, [K, *output.shape].

    Example:
        >>> from resnet_paths.core.backward.linearize import linearize
        >>> layer = torch.nn.Linear(2, 3, bias=False)
        >>> with differentiable_pullbacks():
        ...     output, pullback = linearize(layer, torch.ones(1, 2))
        >>> tangents = torch.eye(2)[:, None]
        >>> torch.equal(pushed(pullback, output, tangents)[:, 0].T, layer.weight)
        True
    """
    if pullback is unchanged or not len(tangents):
        return tangents
    with torch.enable_grad(), differentiable_pullbacks():
        cotangents = tangents.new_zeros(len(tangents), *output.shape, dtype=output.dtype).requires_grad_()
        back = pullback(cotangents)
        if not back.requires_grad:  # a constant
            return cotangents.detach()
        # Rows do not meet in a pullback.
        return torch.autograd.grad(back, cotangents, tangents)[0]

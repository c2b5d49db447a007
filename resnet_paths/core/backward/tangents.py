"""Jacobian-vector products of a part with a stack of tangents, as the transpose of its pullback.

A pullback is linear in the cotangents, so that its transposed Jacobian is the Jacobian of the part. Unlike forward-mode
differentiation this works for every linearization, and for operations without a forward-mode formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from resnet_paths._utils.threads import SharedContext
from resnet_paths.core.backward.linearize import Pullback, unchanged

__all__ = ["DIFFERENTIABLE_PULLBACKS", "pushed", "pushed_all"]


DIFFERENTIABLE_PULLBACKS = SharedContext(lambda: sdpa_kernel(SDPBackend.MATH))
"""Context in which to linearize parts for `pushed`: the backward pass of fused attention is not differentiable."""


def pushed(
    pullback: Pullback,
    output: torch.Tensor,
    tangents: torch.Tensor,
    context: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The tangents of the output of a part: Jacobian-vector products.

    Args:
        pullback: Transposed Jacobian of the part, from a linearization within `DIFFERENTIABLE_PULLBACKS`.
        output: Output of the part at the point, [batch, ...].
        tangents: Tangents of its input, [K, *state.shape].
        context: Tangents of what it reads of the context, by name.

    Returns:
        Tangents of the output, [K, *output.shape].

    Example:
        >>> from resnet_paths.core.backward.linearize import linearize
        >>> layer = torch.nn.Linear(2, 3, bias=False)
        >>> with DIFFERENTIABLE_PULLBACKS:
        ...     output, pullback = linearize(layer, torch.ones(1, 2))
        >>> tangents = torch.eye(2)[:, None]
        >>> torch.equal(pushed(pullback, output, tangents)[:, 0].T, layer.weight)
        True
    """
    if pullback is unchanged or not len(tangents):
        return tangents
    given = [tangents, *((context or {})[name] for name in pullback.context)]
    return pushed_all(lambda stacks: pullback.of_all(stacks[0]), [output], given)[0]


def pushed_all(
    pull: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]],
    outputs: Sequence[torch.Tensor],
    tangents: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """The tangents of several outputs, given those of several inputs.

    Args:
        pull: From a stack of cotangents of each output to one of each input, as of `linearize_all`.
        outputs: The outputs at the point, [batch, ...].
        tangents: Tangents of the inputs, [K, *input.shape].

    Returns:
        Tangents of the outputs, [K, *output.shape].
    """
    size = len(tangents[0])
    with torch.enable_grad(), DIFFERENTIABLE_PULLBACKS:
        cotangents = [tangents[0].new_zeros(size, *y.shape, dtype=y.dtype).requires_grad_() for y in outputs]
        pairs = [(back, t) for back, t in zip(pull(cotangents), tangents, strict=True) if back.requires_grad]
        if not pairs:  # a constant
            return [c.detach() for c in cotangents]
        # Rows do not meet in a pullback.
        found = torch.autograd.grad([b for b, _ in pairs], cotangents, [t for _, t in pairs], allow_unused=True)
    return [c.detach() if t is None else t for c, t in zip(cotangents, found, strict=True)]

"""Whether the gradient of a chain is that of the model by its own autograd.

Compared is the gradient of a random projection of the output with respect to floating-point inputs, and to the
parameters of the stem, which stand for the state after it where inputs are integers such as tokens. Unlike the state
itself, inputs and parameters can be differentiated in the model too, whatever its code looks like.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from resnet_paths._utils.errors import UnravelError
from resnet_paths.unraveling.tracing import name_of
from resnet_paths.unraveling.verification.alone import Alone
from resnet_paths.unraveling.verification.backward_rules import backward_rule_in
from resnet_paths.unraveling.verification.claim import Claim

__all__ = ["check_gradients", "leaves_of"]


def leaves_of(claim: Claim) -> list[nn.Parameter]:
    """The parameters with respect to which gradients are compared.

    Args:
        claim: The chain and the model.

    Returns:
        Those of the stem; all of them where neither the stem nor an input has any numbers to differentiate.
    """
    of_stem = [p for p in claim.chain.stem.parameters() if p.is_floating_point()]
    if of_stem or any(x.is_floating_point() for x in claim.tensors):
        return of_stem
    return [p for p in claim.chain.parameters() if p.is_floating_point()]


def check_gradients(claim: Claim, alone: Alone) -> None:
    """Check the gradient on one example.

    Args:
        claim: The chain and the model; autograd is enabled for the parameters `leaves_of` it.
        alone: The example, and both outputs with their autograd graphs.

    Raises:
        UnravelError: If the gradients differ; the backward rule that `torch.export` does not record is named.
    """
    if not alone.of_model.is_floating_point():
        return
    leaves = [*(x for x in alone.inputs if x.requires_grad), *leaves_of(claim)]
    try:
        expected = _gradients(alone.of_model, leaves)
    except RuntimeError:
        return  # the model itself cannot be differentiated here
    found = _gradients(alone.of_chain, leaves)
    # Where both compute the same bits, so does backward; else a ReLU near zero may switch by rounding.
    eps = max(torch.finfo(dtype).eps for dtype in dtypes_of(claim) | {alone.of_model.dtype})
    tolerance = min(1000 * eps, 0.05) if torch.equal(alone.of_chain, alone.of_model) else 0.05
    if _distance(found, expected) <= tolerance * _norm(expected):
        return
    rule = backward_rule_in(claim, alone.inputs)
    raise UnravelError(
        "model",
        rule or f"{name_of(claim.model)}: the chain's gradient differs from the model's own",
        "operations whose derivative is that of what they compute",
        "torch.export records the forward pass only. Write a straight-through estimate as x + (f(x) - x).detach(), and "
        "a part without gradient as f(x.detach()), outside no_grad and inference_mode; both are kept. verify=False "
        "accepts the chain with the derivative of the forward pass.",
    )


def _gradients(output: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(output.shape, generator=generator).to(output)
    return list(torch.autograd.grad(output, leaves, direction, allow_unused=True, materialize_grads=True))


def dtypes_of(claim: Claim) -> set[torch.dtype]:
    """The floating dtypes in which the model computes; it may round in a coarser one than that of its output.

    Args:
        claim: The chain and its graph.

    Returns:
        The dtypes; of a chain of named blocks none.
    """
    if claim.dtypes is not None:
        return claim.dtypes
    values = [] if claim.traced is None else [node.meta.get("val") for node in claim.traced.graph.nodes]
    return {value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()}


def _distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    if any(not torch.equal(f.isfinite(), e.isfinite()) for f, e in zip(found, expected, strict=True)):
        return float("inf")
    return _norm([f - e for f, e in zip(found, expected, strict=True)])


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    """Euclidean norm of all finite entries together."""
    return float(sum(float(x.nan_to_num(0, 0, 0).norm()) ** 2 for x in tensors) ** 0.5)

"""Deletions and gradients of a chain against its model in plain PyTorch, for the table of architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import resnet_paths as rp
from tests.unraveling.additions import Addition, additions, output_without

TOLERANCE = 1e-4
"""Of the largest entry of an output, and of the norm of a gradient, in float32."""


def spread(model: nn.Module) -> nn.Module:
    """The model with random numbers in place of parameters that are constant as the library initialises them.

    Branches that start at zero, or are scaled by 1e-6, would be deleted without a trace.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        value = parameter.detach().flatten()[0].item() if parameter.numel() else 0.0
        is_bias = name.endswith("bias")
        if parameter.is_floating_point() and not is_bias and bool((parameter == value).all()):
            noise = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_((value if abs(value) >= 0.2 else 0.5) * noise)
    return model


def chosen(returned: Any) -> torch.Tensor:
    """The output that `unravel` takes by default."""
    if isinstance(returned, dict):
        return next(returned[key] for key in ("logits", "last_hidden_state") if key in returned)
    return returned[0] if isinstance(returned, tuple | list) else returned


def deletions(chain: rp.ResidualChain, model: nn.Module, example: torch.Tensor, number: int = 3) -> tuple[int, int]:
    """How many of `number` deletions are right, and how many could be checked.

    Blocks are taken from the first to the last with a skip at even distances, and deleted by their names. What the
    model returns without the branch is made by a run that leaves it out of the block's addition
    (`tests.unraveling.additions`), or, where skip and branch are concatenated, by a forward hook that zeroes the module
    of the block's name. Not checked is what leaves no trace in the output, or is no addition of the trunk.
    """
    blocks = [block for block in chain if block.skip is not None]
    output, found = additions(model, (example,), chosen)
    trunk = [addition for addition in found if addition.on_trunk]
    added = [block.name for block in blocks if block.skip_kind != "concat"]
    matched = _matched(added, [addition for addition in trunk if addition.kind != "concat"])
    joined = [block.name for block in blocks if block.skip_kind == "concat"]
    joins = [addition for addition in trunk if addition.kind == "concat"]
    if len(joins) == len(joined):
        matched |= _matched(joined, joins)
    places = sorted({round(i * (len(blocks) - 1) / max(number - 1, 1)) for i in range(number)}) if blocks else []
    right = checked = 0
    for place in places:
        name = blocks[place].name
        if name in matched:
            expected = output_without(model, (example,), chosen, matched[name])
        elif blocks[place].skip_kind == "concat":
            expected = _with_zeros(model, example, name)
        else:
            continue
        scale = output.abs().max()
        if expected is None or not bool((expected - output).abs().max() > 10 * TOLERANCE * scale):
            continue
        with torch.no_grad():
            deleted = rp.delete_block(chain, name)(example)
        checked += 1
        right += bool((deleted - expected).abs().max() <= TOLERANCE * scale)
    return right, checked


def _matched(names: list[str], trunk: list[Addition]) -> dict[str, Addition]:
    """The addition of each block: the additions of the trunk run in the order of the blocks, and inside its modules."""
    weighted = [addition for addition in trunk if addition.num_weight_layers]
    for candidates in (weighted, trunk):
        if len(candidates) == len(names):
            pairs = dict(zip(names, candidates, strict=True))
            return {name: addition for name, addition in pairs.items() if _plain(name) in map(_plain, addition.modules)}
    pairs = {}
    for name in names:
        held = [addition for addition in trunk if _plain(name) in map(_plain, addition.modules)]
        if len(held) == 1:
            pairs[name] = held[0]
    return pairs


def _plain(name: str) -> str:
    """A module's name without the number of its call or of the addition in it."""
    return ".".join(part.split("@")[0].split("#")[0] for part in name.split("."))


def _with_zeros(model: nn.Module, example: torch.Tensor, name: str) -> torch.Tensor | None:
    modules = dict(model.named_modules())
    if name not in modules:
        return None
    hook = modules[name].register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        with torch.no_grad():
            return chosen(model(example.clone()))
    except (RuntimeError, TypeError):
        return None
    finally:
        hook.remove()


def gradient_difference(chain: rp.ResidualChain, model: nn.Module, example: torch.Tensor) -> float:
    """Norm of the difference of the gradients of chain and model, over the norm of the model's.

    The gradient of one random sum of outputs, at the input, or at all parameters where the input is integers.
    """
    gradients = []
    at: list[torch.Tensor] = []
    for network in (model, chain):
        x = example.clone()
        if x.is_floating_point():
            x, at = x.requires_grad_(), []
        elif not at:
            at = [p for p in model.parameters() if p.requires_grad]
        with torch.enable_grad():
            output = chosen(network(1 * x if x.requires_grad else x))
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            made: Callable[..., Any] = torch.autograd.grad
            gradient = made((output * weights).sum(), at or [x], allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in gradient]).double())
    expected, found = gradients
    return float((found - expected).norm() / expected.norm())

"""First values for every parameter and buffer of a network, drawn from one generator alone."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

__all__ = ["initialise"]


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and buffer of a network its first value.

    Convolutions are drawn by He's rule (fan-out; He et al. 2015) and have biases of 0, linear layers by torch's default
    rule. A module that wants something else has a method ``initialise(generator)``, which is called after these.

    Args:
        model: The network, on the CPU; what it holds before does not matter.
        generator: Source of all random numbers; a CPU generator.
    """
    # What no rule reaches stays NaN and is seen at once, where memory as it was found might look like weights.
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(math.nan)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.reset_parameters()
    for module in model.modules():
        own = getattr(module, "initialise", None)
        if own is not None:
            own(generator)

"""Initialisation of networks from one generator."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

__all__ = ["initialise"]


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Initialise every parameter and buffer of a network.

    Convolutions use He initialisation (fan-out; He et al. 2015) with zero biases, linear layers the default of torch. A
    module with a method ``initialise(generator)`` is initialised by it afterwards.

    Args:
        model: The network, on the CPU; it may be uninitialised.
        generator: CPU generator of all random numbers.
    """
    # Tensors without a rule remain NaN, which is noticed, unlike uninitialised memory.
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

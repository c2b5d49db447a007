"""Units of path length: blocks (default), transformer layers, or weight layers.

===========================  ============================  ==========================  =================================
family                       ``"block"`` (default)         ``"transformer_layer"``     ``"weight_layer"``
===========================  ============================  ==========================  =================================
ResNet and its relatives     residual block                same as ``"block"``         convolutions in the branch
DenseNet                     dense layer                   same as ``"block"``         convolutions in the layer
ConvNeXt, EfficientNet       residual block                same as ``"block"``         convolutions and linear layers
transformers                 attention, MLP (one each)     attention and MLP together  linear layers, longest route
parallel attention and MLP   attention or MLP              attention and MLP together  linear layers of either
highway                      highway layer                 same as ``"block"``         transform or gate
U-Net                        long skip, and those inside   not defined                 not defined
===========================  ============================  ==========================  =================================

A chain has one block per residual addition. Blocks whose names are equal up to the last number, such as
``layers.3.attn`` and ``layers.3.mlp``, belong to the same transformer layer. Veit et al. (2016) count residual modules
(of two convolutions each) in their figures and weight layers in their abstract.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.paths import Choice, HasPathChoices, path_polynomial
from resnet_paths.core.polynomials import product_of_powers
from resnet_paths.core.weight_layers import weight_layers

__all__ = ["UNITS", "length_polynomial"]

UNITS = ("block", "transformer_layer", "weight_layer")
"""Units of path length."""


class CountedBlock(Protocol):
    """What is read of a block: `resnet_paths.core.chain.Block` imports this file."""

    @property
    def name(self) -> str:
        """Its name in the model."""

    @property
    def branches(self) -> Sequence[nn.Module]:
        """The branches that a path may take."""

    @property
    def path_choices(self) -> Sequence[Choice]:
        """The entries that it offers to a path."""


class CountedChain(HasPathChoices, Iterable[CountedBlock], Protocol):
    """What is read of a chain: its blocks, and what they offer to a path."""


def length_polynomial(chain: CountedChain, unit: str) -> list[int]:
    """Number of paths of each length, with lengths in a given unit.

    Args:
        chain: The chain.
        unit: One of `UNITS`.

    Returns:
        Exact ints; entry k is the number of paths of length k.

    Raises:
        ResnetPathsError: If the unit is unknown, or a branch contains a chain and the unit is not ``"block"``.
    """
    if unit not in UNITS:
        raise ResnetPathsError("unit", unit, f"one of {', '.join(map(repr, UNITS))}")
    if unit == "block":
        return path_polynomial(chain)
    blocks = list(chain)
    if any(isinstance(c, tuple) for block in blocks for c in block.path_choices):
        raise ResnetPathsError(
            "unit", unit, "'block' for a chain inside a branch", "Unravel with max_depth=0 to keep branches whole."
        )
    factors: Counter[tuple[int, ...]] = Counter()
    if unit == "transformer_layer":
        for _, group in itertools.groupby(blocks, key=layer_of):
            inside = product_of_powers(Counter(_of_block(block, [1] * len(block.path_choices)) for block in group))
            # A path that takes any branch of the group passes through the layer, otherwise around it.
            factors[inside[0], sum(inside[1:])] += 1
    else:
        factors.update(_of_block(block, _lengths_in_layers(block)) for block in blocks)
    return product_of_powers(factors)


def _of_block(block: CountedBlock, lengths: list[int]) -> tuple[int, ...]:
    coefficients = [0] * (max([0, *lengths]) + 1)
    for choice, length in zip(block.path_choices, lengths, strict=True):
        coefficients[length if choice else 0] += 1
    return tuple(coefficients)


def _lengths_in_layers(block: CountedBlock) -> list[int]:
    """The length that each choice of a block adds to a path."""
    each = iter(map(weight_layers, block.branches))
    return [next(each) if choice else 0 for choice in block.path_choices]


def layer_of(block: CountedBlock) -> object:
    """Equal for the blocks of one transformer layer: the name up to its last number, as in ``layers.3``."""
    parts = block.name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()] or [
        i for i, part in enumerate(parts) if part[-1:].isdigit()
    ]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else block

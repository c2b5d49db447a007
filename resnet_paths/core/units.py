"""What the length of a path counts: additions, whole blocks, or weight layers.

===========================  ===========================  ==========================  ==================================
family                       ``"sublayer"`` (default)     ``"block"``                 ``"layer"``
===========================  ===========================  ==========================  ==================================
ResNet and its relatives     residual block               the same                    convolutions in the branch
DenseNet                     dense layer                  the same                    convolutions in the layer
ConvNeXt, EfficientNet       residual block               the same                    convolutions and linear maps
transformers                 attention, MLP, each one     layer: attention and MLP    linear maps on the longest route
parallel attention and MLP   either of both               layer                       linear maps of either
highway                      layer                        the same                    transform, or its gate
U-Net                        long skip, and those inside  not defined                 not defined
===========================  ===========================  ==========================  ==================================

A chain has one block for each addition: the sublayer is what it counts. Sublayers whose names agree up to the last
number, ``layers.3.attn`` and ``layers.3.mlp``, are one block. The paper counts modules (two convolutions each) in its
figures and layers in its abstract.
"""

from __future__ import annotations

import itertools
from typing import Any

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.paths import multiplied, path_polynomial
from resnet_paths.core.weight_layers import weight_layers

__all__ = ["UNITS", "length_polynomial"]

UNITS = ("sublayer", "block", "layer")
"""Units of the length of a path."""


def length_polynomial(chain: Any, unit: str) -> list[int]:
    """Number of paths by length, lengths counted in a unit.

    Args:
        chain: The chain.
        unit: One of `UNITS`.

    Returns:
        Exact ints; entry k is the number of paths of length k.

    Raises:
        ResnetPathsError: If it is another unit, or a branch holds a chain, whose sublayers alone can be counted.
    """
    if unit not in UNITS:
        raise ResnetPathsError("unit", unit, f"one of {', '.join(map(repr, UNITS))}")
    if unit == "sublayer":
        return path_polynomial(chain)
    blocks = list(chain)
    if any(isinstance(c, tuple) for block in blocks for c in block.path_choices):
        raise ResnetPathsError(
            "unit", unit, "'sublayer' for chains inside branches", "Unravel with max_depth=0 to take branches whole."
        )
    total = [1]
    if unit == "block":
        for _, group in itertools.groupby(blocks, key=_group_of):
            inside = [1]
            for block in group:
                inside = multiplied(inside, _of_block(block, [1] * len(block.path_choices)))
            # A path that takes any branch of the group passes through the block, else past it.
            total = multiplied(total, [inside[0], sum(inside[1:])])
    else:
        for block in blocks:
            total = multiplied(total, _of_block(block, _lengths_in_layers(block)))
    while len(total) > 1 and not total[-1]:
        total.pop()
    return total


def _of_block(block: Any, lengths: list[int]) -> list[int]:
    coefficients = [0] * (max([0, *lengths]) + 1)
    for choice, length in zip(block.path_choices, lengths, strict=True):
        coefficients[length if choice else 0] += 1
    return coefficients


def _lengths_in_layers(block: Any) -> list[int]:
    """How much each of a block's entries adds to a path's length."""
    branches = [block.branch] if sum(map(bool, block.path_choices)) < 2 else list(block.branch)
    each = iter(map(weight_layers, branches))
    return [next(each) if choice else 0 for choice in block.path_choices]


def _group_of(block: Any) -> Any:
    """Equal for the sublayers of one layer: the name up to its last number, as in ``layers.3`` or ``layer_3``."""
    parts = block.name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()] or [
        i for i, part in enumerate(parts) if part[-1:].isdigit()
    ]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else block

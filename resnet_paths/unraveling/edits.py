"""Deletions that take a model as well as a chain: the model is unraveled first.

All other edits are in `resnet_paths.core.edits` and take chains alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core import edits
from resnet_paths.core.chain import ResidualChain
from resnet_paths.unraveling import unravel

__all__ = ["delete_block", "delete_blocks"]


def delete_block(model: nn.Module, block: int | str, *, example_inputs: Any = None) -> ResidualChain:
    """The network without a block's branch; its skip, projection included, and what follows the addition stay.

    The lesion of Veit et al. 2016, section 4.1. Nothing is retrained, and BatchNorm keeps the statistics of the intact
    network. A block without skip is replaced by the identity where input and output have one shape.

    Args:
        model: A chain, or a model together with `example_inputs`.
        block: Position or name.
        example_inputs: As for `unravel`; only for a model that is not a chain.

    Returns:
        A chain of the same length; with half the paths if the block had one skip and one branch.

    Raises:
        ResnetPathsError: If there is no such block, or it has no skip and changes the shape.

    Example:
        >>> from resnet_paths import load_network, unravel
        >>> import torch
        >>> chain = unravel(load_network("preact-resnet-20"), torch.zeros(2, 1, 28, 28))
        >>> chain.num_paths, delete_block(chain, "layer1.2").num_paths
        (512, 256)
    """
    return edits.delete_block(_as_chain(model, example_inputs), block)


def delete_blocks(model: nn.Module, blocks: Iterable[int | str], *, example_inputs: Any = None) -> ResidualChain:
    """The network without several blocks' branches; see `delete_block`.

    Args:
        model: A chain, or a model together with `example_inputs`.
        blocks: Positions or names, in any order.
        example_inputs: As for `unravel`; only for a model that is not a chain.

    Returns:
        A chain; deleting nothing gives an equal chain.

    Raises:
        ResnetPathsError: As `delete_block`.
    """
    return edits.delete_blocks(_as_chain(model, example_inputs), blocks)


def _as_chain(model: nn.Module, example_inputs: Any) -> ResidualChain:
    if isinstance(model, ResidualChain):
        return model
    if example_inputs is None:
        raise ResnetPathsError(
            "example_inputs",
            None,
            f"inputs for {type(model).__name__}, which is not a chain yet",
            "Pass example_inputs=x, or unravel the model once and edit the chain.",
        )
    return unravel(model, example_inputs)

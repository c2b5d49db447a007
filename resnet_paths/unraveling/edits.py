"""Deletions that take a model as well as a chain: the model is unraveled first.

All other edits are in `resnet_paths.core.edits` and take chains alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core import edits
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.signature import Inputs
from resnet_paths.unraveling import unravel

__all__ = ["delete_block", "delete_blocks"]


def delete_block(model: nn.Module, block: int | str, *, example_inputs: Inputs | None = None) -> ResidualChain:
    """The network without the branch of a block; see `resnet_paths.core.edits.delete_block`.

    Args:
        model: A chain, or a model together with `example_inputs`.
        block: Position or name.
        example_inputs: As for `unravel`; only for a model that is not a chain.

    Returns:
        A new chain of the same length that shares all weights.

    Raises:
        ResnetPathsError: As `resnet_paths.core.edits.delete_block`, and if `example_inputs` is missing.
    """
    return edits.delete_block(_as_chain(model, example_inputs), block)


def delete_blocks(
    model: nn.Module, blocks: Iterable[int | str], *, example_inputs: Inputs | None = None
) -> ResidualChain:
    """The network without the branches of several blocks; see `resnet_paths.core.edits.delete_blocks`.

    Args:
        model: A chain, or a model together with `example_inputs`.
        blocks: Positions or names, in any order.
        example_inputs: As for `unravel`; only for a model that is not a chain.

    Returns:
        A new chain of the same length that shares all weights.

    Raises:
        ResnetPathsError: As `delete_block`.
    """
    return edits.delete_blocks(_as_chain(model, example_inputs), blocks)


def _as_chain(model: nn.Module, example_inputs: Inputs | None) -> ResidualChain:
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

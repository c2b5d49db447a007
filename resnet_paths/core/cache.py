"""What the blocks of a chain read, skipped and added in one forward pass; see `ResidualChain.run_with_cache`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch

from resnet_paths._utils.errors import ResnetPathsError, nearest_names

__all__ = ["ByBlock", "Cache"]


class ByBlock(Sequence[torch.Tensor | None]):
    """Values in the order of the blocks, read by position or by the block's name.

    Args:
        values: One value per block; of states one more at the end, the output of the last block.
        names: Names of the blocks.
    """

    def __init__(self, values: Sequence[torch.Tensor | None], names: Sequence[str]) -> None:
        self._values = tuple(values)
        self._names = list(names)

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, block: int | str) -> torch.Tensor | None: ...
    @overload
    def __getitem__(self, block: slice) -> Sequence[torch.Tensor | None]: ...
    def __getitem__(self, block: int | str | slice) -> torch.Tensor | Sequence[torch.Tensor | None] | None:
        """The value of a block, by position or name."""
        if isinstance(block, str):
            if block not in self._names:
                nearest = nearest_names(block, self._names)
                raise ResnetPathsError("block", block, f"the name of a block, nearest {nearest}")
            return self._values[self._names.index(block)]
        return self._values[block]


@dataclass(frozen=True)
class Cache:
    """The values of one forward pass.

    Attributes:
        state: What each block read, [batch, *in_shape]; one more entry at the end, the output of the last block.
        skip: What each block's skip returned; None where there is no skip.
        branch: What each block's branch returned; None where it is deleted.
        context: What blocks and head read in addition to the state, by name.
    """

    state: ByBlock
    skip: ByBlock
    branch: ByBlock
    context: Mapping[str, torch.Tensor]

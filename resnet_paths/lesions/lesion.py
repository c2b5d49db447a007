"""A lesion as data: what is done to which blocks, interpreted by the edits of `resnet_paths.core.edits`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, replace

from scipy import stats
from torch import nn

from resnet_paths._utils.arguments import require_float, require_int
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.edits import (
    delete_blocks,
    duplicate_block,
    parallel_blocks,
    permute_blocks,
    renamed,
    scale_block,
    swap_blocks,
)
from resnet_paths.core.groups import group_blocks, runs_of
from resnet_paths.lesions.guard import guard_of

__all__ = ["KINDS", "Lesion", "edits_of"]

KINDS = ("delete", "duplicate", "duplicate_range", "scale", "swap", "permute", "replace", "repeat", "parallel")
"""What a lesion may do to its blocks."""

# The parameters that a kind needs.
_NEEDS = {"scale": "factor", "permute": "order", "replace": "branch", "": "function"}


@dataclass(frozen=True)
class Lesion:
    """An edit of a chain as a value.

    Attributes:
        kind: What is done to `blocks`, and nothing else: ``"delete"``, ``"duplicate"`` (each run twice in a row),
            ``"duplicate_range"`` (the range of neighbours run twice in a row), ``"scale"`` (their branches times
            `factor`), ``"swap"`` (two in each other's place, or all blocks in `order`), ``"permute"`` (all blocks in
            `order`), ``"replace"`` (their branches by `branch`), ``"repeat"`` (the middle one in the place of each) or
            ``"parallel"`` (run side by side and averaged, `loops` times); empty for a `function`.
        blocks: Positions of the blocks; None where they are not known.
        name: Name in tables and figures, such as ``"delete layer2.0"``.
        factor: Of ``"scale"``, a finite number.
        order: For ``"swap"`` and ``"permute"``: for each position, the old position of the block that is moved there.
        branch: Of ``"replace"``, the new branch.
        loops: For ``"parallel"``, the number of rounds.
        runs: Runs of blocks that the edit takes as one block each, as `resnet_paths.group_blocks` does, such as
            transformer layers; `blocks` and `order` then hold all blocks of a run.
        seed: Seed that the generator which drew the lesion started from; None if none did.
        function: Function from the intact chain to the lesioned one, for a lesion of no kind above.
        key: Identifies a `function` in a store, in addition to the network that it makes. Of modules that were not
            exported a store compares class, attributes, tensors, and outputs for a probe of two examples; choose
            another key when their code changes in a way that this may not show.

    Raises:
        ResnetPathsError: If the kind is unknown, or its parameter is missing.

    Example:
        >>> Lesion("delete", (3, 7)).num_blocks
        2
        >>> round(Lesion("permute", (0, 1), order=(1, 0, 2)).kendall_tau, 3)
        0.333
    """

    kind: str
    blocks: tuple[int, ...] | None = None
    _: KW_ONLY
    name: str = ""
    factor: float | None = None
    order: tuple[int, ...] | None = None
    branch: nn.Module | None = None
    loops: int = 1
    runs: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    function: Callable[[ResidualChain], ResidualChain] | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        """Validate kind and parameters."""
        if self.kind and self.kind not in KINDS:
            allowed = f"one of {', '.join(map(repr, KINDS))}, or '' with a function"
            raise ResnetPathsError("kind", self.kind, allowed)
        needed = _NEEDS.get(self.kind)
        if needed and getattr(self, needed) is None:
            raise ResnetPathsError(needed, None, f"the {needed} of a lesion of kind {self.kind!r}")
        if self.key is not None and (self.kind or not isinstance(self.key, str)):
            raise ResnetPathsError("key", self.key, "a str, with a function", "Other lesions need none.")
        require_int("loops", self.loops, 1)
        if self.factor is not None:
            require_float("factor", self.factor)
        if self.kind and (self.blocks is None or not hasattr(self.blocks, "__iter__")):
            raise ResnetPathsError("blocks", self.blocks, "a tuple of positions of blocks")
        if self.kind == "swap" and self.order is None and len(self.blocks or ()) != 2:
            raise ResnetPathsError("blocks", self.blocks, "two positions to swap", "Pass order for several swaps.")

    @property
    def num_blocks(self) -> int | None:
        """Number of blocks that it changes; None if not known."""
        return None if self.blocks is None else len(self.blocks)

    @property
    def kendall_tau(self) -> float:
        """Kendall's rank correlation of the order of blocks with the intact one: 1 if none moved, NaN if not known."""
        if self.order is not None and len(self.order) > 1:
            return float(stats.kendalltau(range(len(self.order)), self.order).statistic)
        known = self.function is None and (self.kind != "swap" or self.order is not None)
        return 1.0 if known else math.nan

    def edit(self, chain: ResidualChain) -> ResidualChain:
        """The edited chain, which shares all weights with the intact one.

        Args:
            chain: The intact chain.

        Returns:
            A new chain that shares all weights.

        Raises:
            ResnetPathsError: If the chain has no such blocks, or they do not allow such an edit.
        """
        if self.function is not None:
            return self.function(chain)
        if self.runs:
            return self._of_groups(chain).edit(group_blocks(chain, self.runs))
        if self.kind in ("swap", "permute") and self.order is not None:
            return permute_blocks(chain, self.order)
        if self.kind == "delete":
            return delete_blocks(chain, self.blocks or ())
        if self.kind == "swap":
            return swap_blocks(chain, *self.blocks or ())
        blocks = [chain.block_index(block) for block in self.blocks or ()]  # positions in this chain
        if self.kind == "replace":
            return chain.with_blocks(b.replace(branch=self.branch) if i in blocks else b for i, b in enumerate(chain))
        if self.kind == "repeat":
            return _with_repeated_middle(chain, blocks)
        if self.kind == "duplicate_range":
            return duplicate_block(group_blocks(chain, [blocks]), min(blocks))
        if self.kind == "parallel":
            chain = parallel_blocks(chain, blocks)
            for _ in range(self.loops - 1):
                chain = duplicate_block(chain, min(blocks))
            return chain
        for index in sorted(blocks, reverse=True):  # from the last to the first: a copy shifts those after it
            if self.kind == "duplicate":
                chain = duplicate_block(chain, index)
            else:
                assert self.factor is not None  # held by __post_init__
                chain = scale_block(chain, index, self.factor)
        return chain

    def _of_groups(self, chain: ResidualChain) -> Lesion:
        """The lesion of the chain in which each run is one block."""
        starts = {index: run[0] for run in runs_of(chain, self.runs) for index in run}
        first = [starts.get(index, index) for index in range(len(chain))]
        numbers = {start: number for number, start in enumerate(dict.fromkeys(first))}
        number_of = [numbers[start] for start in first]
        blocks, order = (
            None if places is None else tuple(dict.fromkeys(number_of[chain.block_index(block)] for block in places))
            for places in (self.blocks, self.order)
        )
        return replace(self, blocks=blocks, order=order, runs=())


def _with_repeated_middle(chain: ResidualChain, blocks: Sequence[int]) -> ResidualChain:
    middle = chain[blocks[len(blocks) // 2]]
    return chain.with_blocks(
        renamed(middle, f"{middle.name}@{index}", f"@{index}") if index in blocks else block
        for index, block in enumerate(chain)
    )


def edits_of(chain: ResidualChain, lesions: Iterable[Lesion]) -> Iterator[tuple[Lesion, ResidualChain]]:
    """Each lesion and the chain that it makes, one at a time.

    Args:
        chain: The intact chain.
        lesions: Lesions of it.

    Yields:
        A lesion, and the lesioned chain.

    Raises:
        ResnetPathsError: If a lesion does not fit the chain, raises, or changes the chain that it is given.
    """
    guard: Callable[[str], AbstractContextManager[None]] | None = None
    for lesion in lesions:
        if lesion.function is None:
            yield lesion, lesion.edit(chain)
            continue
        guard = guard or guard_of(chain)
        try:
            with guard(lesion.name):
                edited = lesion.edit(chain)
        except ResnetPathsError:
            raise
        except Exception as error:
            raise ResnetPathsError(
                "lesions",
                lesion.name,
                "functions from chain to chain that do not raise",
                f"It raised {type(error).__name__}: {error}",
            ) from error
        yield lesion, edited

"""What a block is on a flat graph: the values between which its parts stand."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from resnet_paths.unraveling.packing import Packed
from resnet_paths.unraveling.tracing import Trace

__all__ = ["LadderStep", "Lane", "Options", "Part"]


@dataclass(frozen=True)
class Options:
    """What the caller says of a model's structure.

    Attributes:
        max_depth: How many chains may stand inside one another; None for any number.
        skips: Names of modules that are skips, where the graph does not tell.
    """

    max_depth: int | None = None
    skips: tuple[str, ...] = ()

    @property
    def inside(self) -> Options:
        """The options for chains inside branches."""
        return self if self.max_depth is None else replace(self, max_depth=self.max_depth - 1)


@dataclass(frozen=True)
class Part:
    """A block on the graph: ``start -pre-> fork -(skip, branches)-> merge -post-> end``.

    Attributes:
        module: The module whose forward merges; empty where it does not tell one block from another.
        start: Where the block before ends.
        fork: Where skip and branches part.
        merge: What they add up to.
        end: The last value that belongs to the block.
        skip: What is added to the branches; None where there is no skip.
        branches: What is added to the skip; several are alternatives that a path may take.
        inner: For each branch the blocks inside it; none where it holds no chain.
        onto_skip: Whether the branches are added to the skip one after the other, not their sum at once.
        joins: Whether the operands are concatenated, that is, added in a wider space.
        guess: How the skip was guessed; empty where it is certain.
        pre_stays: Whether what is between start and fork belongs to no block.
        is_mixture: Whether the skip is a multiple of the value at the fork.
    """

    module: str
    start: Node | Packed
    fork: Node | Packed
    merge: Node | Packed
    end: Node | Packed
    skip: Node | Packed | None
    branches: tuple[Node | Packed, ...]
    inner: tuple[tuple[Part, ...], ...] = ((),)
    onto_skip: bool = False
    joins: bool = False
    guess: str = ""
    pre_stays: bool = False
    is_mixture: bool = False

    def starting_at(self, start: Node | Packed) -> Part:
        """The same block, with what stands before it taken in."""
        return replace(self, start=start)


@dataclass(frozen=True)
class Lane:
    """Some blocks in a row that also read what none of them changes, such as the tokens that a class token attends to.

    Attributes:
        traced: The graph in which only what is made from their first value counts as dependent.
        entry: The last value before them.
        trunk: From their first value to the last merge.
        layout: The state that holds their value and what they read beside it.
    """

    traced: Trace
    entry: Node
    trunk: tuple[Node, ...]
    layout: Packed

    def state(self, x: Node) -> Packed:
        """The state whose value is `x`."""
        return self.layout.holding(x, *self.layout.values[1:])

    def added(self, branch: Node) -> Packed:
        """What a branch adds to the state: nothing to what is read beside the value."""
        return self.layout.holding(branch, *[None] * (len(self.layout.values) - 1))


@dataclass(frozen=True)
class LadderStep:
    """A block on the pair of a value x and a sum s, as in WaveNet: x + branch(x) and s + side(x).

    Attributes:
        fork: x.
        merge: Where the branch is added to x; None for the last block, which adds to the sum alone.
        branch: What is added to x; None for the last block.
        side: What is added to the sum.
    """

    fork: Node
    merge: Node | None
    branch: Node | None
    side: Node

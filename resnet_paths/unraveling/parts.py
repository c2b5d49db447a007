"""What a block is on a flat graph: the nodes between which its parts stand."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from resnet_paths.unraveling.tracing import Trace

__all__ = ["Lane", "Part", "Rung"]


@dataclass(frozen=True)
class Part:
    """A block on the graph: ``start -pre-> fork -(skip, branches)-> merge -post-> end``.

    Attributes:
        module: The module whose forward merges.
        start: Where the block before ends.
        fork: Where skip and branches part.
        merge: Where they are added, or concatenated.
        end: The last node that belongs to the block.
        skip: Operand of the merge; None where there is no skip.
        branches: The other operands; several are alternatives that a path may take.
        inner: For each branch the blocks inside it; none where it holds no chain.
        onto_skip: Whether the branches are added to the skip one after the other, not their sum at once.
        rungs: Where the part is a ladder, whose state is a pair, its blocks; it has no branches of its own then.
        lane: The run of blocks it belongs to, where these carry something along; None elsewhere.
    """

    module: str
    start: Node
    fork: Node
    merge: Node
    end: Node
    skip: Node | None
    branches: tuple[Node, ...]
    inner: tuple[tuple[Part, ...], ...] = ((),)
    onto_skip: bool = False
    rungs: tuple[Rung, ...] = ()
    lane: Lane | None = None


@dataclass(frozen=True)
class Lane:
    """Some blocks in a row that also read what none of them changes, such as the tokens that a class token attends to.

    Attributes:
        traced: The graph in which only what is made from their first value counts as dependent.
        entry: The last value before them.
        trunk: From their first value to the last merge.
        carried: What they read beside it, made from the entry.
    """

    traced: Trace
    entry: Node
    trunk: tuple[Node, ...]
    carried: tuple[Node, ...]


@dataclass(frozen=True)
class Rung:
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

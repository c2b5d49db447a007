"""From the blocks on a graph to a chain of modules that share the model's weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn
from torch.fx import Node

from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.input_sizes import CheckedInputs, InputSizes
from resnet_paths.core.parts import Parallel
from resnet_paths.core.signature import Signature
from resnet_paths.unraveling.block_names import names_of, names_of_branches
from resnet_paths.unraveling.packing import Packed
from resnet_paths.unraveling.parts import Part
from resnet_paths.unraveling.sizes import on_example
from resnet_paths.unraveling.tracing import Trace

__all__ = ["assemble"]


def assemble(
    traced: Trace,
    parts: Sequence[Part],
    sizes: InputSizes,
    signature: Signature | None = None,
    context: Sequence[Node] = (),
) -> ResidualChain:
    """The chain that the parts of a graph make.

    Args:
        traced: The graph.
        parts: Its blocks, in order.
        sizes: The sizes that the inputs may have.
        signature: How the chain is to be called; None for tensors in a row.
        context: Values that the stem computes for blocks and head to read.

    Returns:
        A chain in eval mode.
    """
    stem = CheckedInputs(traced.segment(traced.inputs, parts[0].start, *context), sizes, signature)
    assembler = _Assembler(traced, context)
    chain = assembler.chain(stem, parts, traced.output, context_names=[node.name for node in context])
    chain.notes = (*assembler.notes, f"Input sizes: {sizes}.")
    chain.casts = traced.casts
    return chain


class _Assembler:
    """Cuts the parts of blocks out of a graph."""

    def __init__(self, traced: Trace, context: Sequence[Node]) -> None:
        self.traced = traced
        self.context = list(context)
        self.names: set[str] = set()
        self.notes: list[str] = []

    def cut(self, source: Node | Packed, target: Node | Packed, term_of: Node | Packed | None = None) -> nn.Module:
        """What leads from one state to another, or to a term of a sum."""
        return self.traced.segment(source, target, context=self.context, term_of=term_of)

    def chain(
        self,
        stem: nn.Module,
        parts: Sequence[Part],
        target: Node | Packed,
        *,
        term_of: Node | Packed | None = None,
        context_names: Sequence[str] = (),
        outer_names: Collection[str] = (),
    ) -> ResidualChain:
        """The chain from a stem to a target, with its blocks between; blocks around it bear the outer names."""
        # The whole tree has no two blocks of one name. Those inside branches are named before those around them, but
        # leave the names of the modules that these are.
        own = {part.module for part in parts}
        branches = [self._branches(part, {*outer_names, *own}) for part in parts]
        names = names_of(self.traced, parts, {*self.names, *outer_names})
        self.names.update(names)
        blocks: list[Block] = []
        stage, state = 0, parts[0].start
        for part, made, name in zip(parts, branches, names, strict=True):
            if blocks and self._shape(_value(part.end)) != self._shape(_value(state)):
                stage += 1
            # Nodes that are between two blocks of a plain net and belong to neither go before the later one.
            blocks.append(self._block(part.starting_at(state), made, name, stage))
            state = part.end
            if part.guess:
                self.notes.append(f"{name}: {part.guess}.")
        chain = ResidualChain(stem, blocks, self.cut(state, target, term_of), context_names)
        chain.training = chain.blocks.training = False
        chain.eval_only = True
        return chain

    def _block(self, part: Part, branches: Sequence[nn.Module], name: str, stage: int) -> Block:
        branch_names = names_of_branches(self.traced, part, name, self.names)
        self.names.update(branch_names)
        block = Block(
            branches[0] if len(branches) == 1 else Parallel(branches, onto_skip=part.onto_skip, names=branch_names),
            None if part.skip is None else self.cut(part.fork, part.skip, _sum_of(part)),
            pre=self.cut(part.start, part.fork),
            pre_stays=part.pre_stays,
            post=self.cut(part.merge, part.end),
            name=name,
            skip_kind="concat" if part.joins and part.skip is not None else None,
            stage=stage,
            in_shape=self._shape(part.start),
            out_shape=self._shape(part.end),
        )
        block.training = False
        return block

    def _branches(self, part: Part, outer_names: Collection[str]) -> list[nn.Module]:
        """What leads from the fork to each branch's end: a chain of its own where there are blocks on the way."""
        made: list[nn.Module] = []
        for branch, inner in zip(part.branches, part.inner, strict=True):
            if inner:
                stem = self.cut(part.fork, inner[0].start)
                made.append(self.chain(stem, inner, branch, term_of=_sum_of(part), outer_names=outer_names))
            else:
                made.append(self.cut(part.fork, branch, _sum_of(part)))
        return made

    def _shape(self, state: Node | Packed) -> tuple[int, ...]:
        """Shape without the batch, on the example; a dimension that varies with the batch is -1."""
        shape = state.shape if isinstance(state, Packed) else state.meta["val"].shape
        return on_example(shape[1:], self.traced.inputs)


def _sum_of(part: Part) -> Node | Packed | None:
    """What the terms of a block add up to; None where they are concatenated, each in a place of its own."""
    return None if part.joins else part.merge


def _value(state: Node | Packed) -> Node:
    """The value that blocks change, of a state that holds what they read as well."""
    return state.like[0] if isinstance(state, Packed) else state

"""From the blocks on a graph to a chain of modules that share the model's weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Parallel, Placed
from resnet_paths.core.signature import Signature
from resnet_paths.core.tuple_states import Carrying, OnParts, Take, WithEmptySum
from resnet_paths.core.weight_layers import is_weighted
from resnet_paths.unraveling.carrying import kind_of
from resnet_paths.unraveling.concatenations import dimension
from resnet_paths.unraveling.parts import Part
from resnet_paths.unraveling.tracing import FixedShape, Trace, common_module, module_path

__all__ = ["assemble"]

_CAT = torch.ops.aten.cat.default


class _Cutter:
    """Cuts parts of blocks out of a graph; where something is carried along, they work on the state that holds it."""

    def __init__(self, traced: Trace, carried: Sequence[Node] = ()) -> None:
        self.traced = traced
        self.carried = list(carried)
        self.kinds = [kind_of(node) for node in carried]

    def part(self, source: Node, target: Node, *, adds: bool = False) -> nn.Module:
        """What leads from one node to another; `adds` if its result is added to another state."""
        if not self.carried:
            return self.traced.segment([source], target)
        if source is target and not adds:
            return nn.Identity().eval()
        return OnParts(self.traced.segment([source, *self.carried], target), kinds=self.kinds, adds=adds)

    def shape(self, node: Node) -> tuple[Any, ...]:
        """Shape of the state whose x is a node, without the batch."""
        return (_shape(node), *map(_shape, self.carried)) if self.carried else _shape(node)

    def stem(self, start: Node) -> nn.Module:
        """What leads from the inputs to the first state."""
        module = self.traced.segment(self.traced.inputs, start, *self.carried)
        return Carrying(module, self.kinds) if self.carried else module

    def head(self, end: Node) -> nn.Module:
        """What leads from the last state to the output."""
        module = self.part(end, self.traced.output)
        return _in_series(module, Take(0)) if self.carried else module

    def enter(self, start: Node, fork: Node) -> nn.Module:
        """What leads from a state that carries nothing to one of this cutter's."""
        return Carrying(self.traced.segment([start], fork, *self.carried), self.kinds)

    def on_first(self, module: nn.Module) -> nn.Module:
        """A module of one tensor as a part of a block."""
        return OnParts(module) if self.carried else module


def assemble(
    traced: Trace, parts: Sequence[Part], signature: Signature | None = None, carried: Sequence[Node] = ()
) -> ResidualChain:
    """The chain that the parts of a graph make.

    Args:
        traced: The graph.
        parts: Its blocks, in order.
        signature: How the chain is to be called; None for tensors in a row.
        carried: Values that every block is given, beside what it works on.

    Returns:
        A chain in eval mode.
    """
    shapes = [tuple(node.meta["val"].shape[1:]) for node in traced.inputs]
    tensors_of = None if signature is None else signature.tensors
    cutter = _Cutter(traced, carried)
    stem = FixedShape(cutter.stem(parts[0].start), shapes, tensors_of)
    return _chain(cutter, stem, parts, cutter.head(parts[-1].end))


def _chain(cutter: _Cutter, stem: nn.Module, parts: Sequence[Part], head: nn.Module) -> ResidualChain:
    traced = cutter.traced
    blocks: list[Block] = []
    stage, previous_shape = 0, None
    lanes = [part.lane for part in parts]
    outer = cutter
    for index, (part, name) in enumerate(zip(parts, _names(traced, parts), strict=True)):
        if previous_shape is not None and _shape(part.end) != previous_shape:
            stage += 1
        previous_shape = _shape(part.end)
        lane = part.lane
        enters = lane is not None and (index == 0 or lanes[index - 1] is not lane)
        leaves = lane is not None and (index == len(parts) - 1 or lanes[index + 1] is not lane)
        if lane is None:
            cutter = outer
        elif enters:
            cutter = _Cutter(lane.traced, lane.carried)
        if part.rungs:
            blocks += _ladder(traced, part, stage)
            continue
        skip = None if part.skip is None else cutter.part(part.fork, part.skip)
        # Without a skip the first branch brings what is carried along.
        branches = [
            _branch(cutter, part, branch, inner, adds=part.skip is not None or number > 0)
            for number, (branch, inner) in enumerate(zip(part.branches, part.inner, strict=True))
        ]
        is_joined = part.merge.target is _CAT and part.merge not in part.branches  # one inside a plain block is not
        if is_joined:
            skip, branches = _placed(cutter, part, skip, branches)
        post = cutter.part(part.merge, part.end)
        block = Block(
            branches[0] if len(branches) == 1 else Parallel(branches, onto_skip=part.onto_skip),
            skip,
            pre=cutter.enter(part.start, part.fork) if enters else cutter.part(part.start, part.fork),
            post=_in_series(post, Take(0)) if leaves else post,
            name=name,
            skip_kind="concat" if is_joined and skip is not None else None,
            stage=stage,
            in_shape=(outer if enters else cutter).shape(part.start),
            out_shape=(outer if leaves else cutter).shape(part.end),
        )
        block.training = False
        blocks.append(block)
    # Between blocks of a plain net there may be trunk nodes that belong to neither: they go before the later block.
    for index, (left, right) in enumerate(itertools.pairwise(parts)):
        if left.end is not right.start and not any(part.rungs for part in parts):
            gap = outer.part(left.end, right.start)
            blocks[index + 1] = blocks[index + 1].replace(pre=gap, in_shape=outer.shape(left.end))
    chain = ResidualChain(stem, blocks, head)
    chain.training = chain.blocks.training = False
    chain.eval_only = True
    return chain


def _ladder(traced: Trace, part: Part, stage: int) -> list[Block]:
    """The blocks of a ladder: the first makes the pair of x and an empty sum, the last leaves the sum."""
    summed = _shape(part.merge)
    names = [module_path(rung.merge if rung.merge is not None else rung.side) for rung in part.rungs]
    blocks = []
    for index, (rung, name) in enumerate(zip(part.rungs, names, strict=True)):
        added = {0: rung.branch, 1: rung.side} if rung.branch is not None else {1: rung.side}
        later = part.rungs[index + 1].fork if rung.merge is not None else None
        before = _in_series(traced.segment([part.start], part.fork), WithEmptySum(summed)) if index == 0 else None
        if rung.merge is None or later is None:
            after: nn.Module = _in_series(Take(1), traced.segment([part.merge], part.end))
        else:
            after = OnParts(traced.segment([rung.merge], later))
        block = Block(
            OnParts(traced.segment([rung.fork], *added.values()), list(added), adds=True),
            nn.Identity(),
            pre=before,
            post=after,
            name=name if names.count(name) == 1 and name else f"block{index}",
            stage=stage,
            in_shape=_shape(part.start) if index == 0 else (_shape(rung.fork), summed),
            out_shape=_shape(part.end) if later is None else (_shape(later), summed),
        )
        blocks.append(block.train(False))
    return blocks


def _in_series(*modules: nn.Module) -> nn.Module:
    needed = [module for module in modules if not isinstance(module, nn.Identity)]
    return needed[0].eval() if len(needed) == 1 else nn.Sequential(*needed).eval()


def _branch(cutter: _Cutter, part: Part, branch: Node, inner: Sequence[Part], *, adds: bool) -> nn.Module:
    """What leads from the fork to an operand of the merge: a chain of its own where there are blocks on the way."""
    if not inner:
        return cutter.part(part.fork, branch, adds=adds)
    stem = cutter.part(part.fork, inner[0].start)
    return _chain(cutter, stem, inner, cutter.part(inner[-1].end, branch, adds=adds))


def _placed(
    cutter: _Cutter, part: Part, skip: nn.Module | None, branches: list[nn.Module]
) -> tuple[nn.Module | None, list[nn.Module]]:
    """Skip and branches of a concatenation: each placed into the wider space, where they are added."""
    dim, operands = dimension(part.merge), list(part.merge.args[0])  # type: ignore[arg-type]
    sizes = [int(node.meta["val"].shape[dim]) for node in operands]

    def placed(module: nn.Module, operand: Node) -> nn.Module:
        index = operands.index(operand)
        place = cutter.on_first(Placed(dim, sum(sizes[:index]), sum(sizes[index + 1 :])).eval())
        if isinstance(module, ResidualChain):  # its paths still count
            return module.with_head(_in_series(module.head, place))
        return place if isinstance(module, nn.Identity) else nn.Sequential(module, place).eval()

    if skip is not None and part.skip is not None:
        skip = placed(skip, part.skip)
    return skip, [placed(*each) for each in zip(branches, part.branches, strict=True)]


def _names(traced: Trace, parts: Sequence[Part]) -> list[str]:
    """A name a block: the module whose forward merges; where several merge in one, the module of the branch."""
    # Where features are concatenated, the merge stands in the layer that reads them: not a name for this block.
    by_merge = ["" if part.merge.target is _CAT else part.module for part in parts]
    names: list[str] = []
    for index, (part, name) in enumerate(zip(parts, by_merge, strict=True)):
        if name and by_merge.count(name) == 1:
            names.append(name)
            continue
        graph = traced if part.lane is None else part.lane.traced
        region = set().union(*(graph.region([part.fork], branch) for branch in part.branches))
        candidates = (common_module(region), common_module(n for n in region if is_weighted(n)))
        taken = {"", *names, *by_merge}
        free = [candidate for candidate in candidates if candidate not in taken]
        known = next((candidate for candidate in candidates if candidate), name)
        # A module that is run again, with the same weights: layer, layer@1, layer@2...
        again = (f"{known}@{k}" for k in itertools.count(1) if f"{known}@{k}" not in taken)
        names.append(free[0] if free else next(again) if known in names else name and f"{name}#{index}")
        names[-1] = names[-1] or f"block{index}"
    return names


def _shape(node: Node) -> tuple[int, ...]:
    """Shape without the batch; a dimension that varies with the batch is -1."""
    return tuple(int(d) if isinstance(d, int) else -1 for d in node.meta["val"].shape[1:])

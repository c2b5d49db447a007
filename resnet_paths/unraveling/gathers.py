"""States of blocks in a row that a later concatenation gathers, as the head of an ECAPA-TDNN or a C2f module of a YOLO.

``cat(x_1, x_2, x_3)`` with x_2 = x_1 + f(x_1) and x_3 = x_2 + g(x_2) is no block: x_3 holds x_1 itself, by way of the
skips. The same holds for a sum, ``a * x_1 + b * x_2 + c * x_3``, as the weighted average of a DenseFormer. The state of
these blocks holds, beside x, what is gathered so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from resnet_paths.core.weight_layers import makes_branch
from resnet_paths.unraveling.concatenations import dimension
from resnet_paths.unraveling.merges import is_held, summands_of, trunk_between
from resnet_paths.unraveling.packing import Packed, pack
from resnet_paths.unraveling.parts import Part
from resnet_paths.unraveling.tracing import Trace

__all__ = ["gathering_parts"]

_ADD = torch.ops.aten.add.Tensor
_CAT = torch.ops.aten.cat.default


def gathering_parts(
    traced: Trace, fork: Node, merge: Node, blocks_between: Callable[[Node, Node], Sequence[Part]]
) -> tuple[Part, ...]:
    """The blocks whose states a concatenation or a sum gathers.

    Args:
        traced: The graph.
        fork: The node on the trunk before it.
        merge: The concatenation, or the last addition of the sum.
        blocks_between: The blocks on the way from one node to another.

    Returns:
        The blocks, whose states hold what is gathered beside the value; none where the node is something else, such as
        a merge of skip and branch. A sum of two states is such a merge, of a skip around some blocks.
    """
    if merge.target is _CAT:
        operands = _operands(merge)
    elif merge.target is _ADD:
        operands = summands_of(traced, fork, merge, states=True)
        if len(operands) < 3:
            return ()
    else:
        return ()
    last = _last_state(traced, fork, operands)
    if last is None:
        return ()
    parts = blocks_between(fork, last)
    if not parts or any(isinstance(part.end, Packed) or part.skip is None or part.joins for part in parts):
        return ()
    slots = _slots(traced, parts, trunk_between(traced, fork, last), [node for node in operands if node is not last])
    # The state keeps its shape while it is carried.
    fixed = {str(node.meta["val"].shape) for part in parts for node in (part.fork, part.end) if isinstance(node, Node)}
    start = parts[0].fork
    layout = pack(start, *slots) if slots and len(fixed) == 1 and isinstance(start, Node) else None
    return () if layout is None else tuple(_carrying(parts, layout, list(slots.values())))


def _operands(cat: Node) -> list[Node]:
    """What is concatenated, that of concatenations inside it included."""
    found: list[Node] = []
    for operand in cat.args[0]:  # type: ignore[union-attr]
        assert isinstance(operand, Node)
        inner = operand.target is _CAT and len(operand.users) == 1 and dimension(operand) == dimension(cat)
        found += _operands(operand) if inner else [operand]
    return found


def _last_state(traced: Trace, fork: Node, operands: Sequence[Node]) -> Node | None:
    """What is behind most layers and holds the fork's value, or a part of it, by way of skips; None if none does."""
    found, most = None, 0
    for operand in traced.in_order(set(operands)):
        if not traced.depends_on_input(operand):
            return None
        layers = sum(map(makes_branch, traced.region([fork], operand)))
        if layers and layers >= most and is_held(traced, fork, operand):
            found, most = operand, layers
    return found


def _slots(traced: Trace, parts: Sequence[Part], trunk: Sequence[Node], gathered: Sequence[Node]) -> dict[Node, int]:
    """For each gathered value the block before which it is known; none where a block or a layer makes one."""
    position = {node: i for i, node in enumerate(trunk)}
    found: dict[Node, int] = {}
    for node in gathered:
        source = next(n for n in reversed(trunk_between(traced, trunk[0], node)) if n in position)
        # What is made from the last state is computed where it is gathered.
        index = next((i for i, part in enumerate(parts) if position[source] <= _at(position, part.fork)), len(parts))
        made_inside = position[source] < (_at(position, parts[index - 1].end) if index else 0)
        if made_inside or any(map(makes_branch, traced.region([source], node))):
            return {}
        if index < len(parts):
            found[node] = index
    return {node: found[node] for node in sorted(found, key=found.__getitem__)}


def _at(position: dict[Node, int], node: Node | Packed) -> int:
    assert isinstance(node, Node)  # held by gathering_parts
    return position[node]


def _carrying(parts: Sequence[Part], layout: Packed, known: Sequence[int]) -> list[Part]:
    """Blocks whose states hold some values beside their own, once they are known; their branches add nothing to these.

    What is gathered is put into the state before a block, and stays there when the block is deleted.

    Returns:
        The blocks.
    """
    values = layout.values[1:]

    def state(x: Node | Packed | None, index: int) -> Packed:
        assert not isinstance(x, Packed)  # held by gathering_parts
        return layout.holding(x, *(value if at <= index else None for value, at in zip(values, known, strict=True)))

    found = []
    for i, part in enumerate(parts):
        found.append(
            replace(
                part,
                start=part.start if i == 0 else state(part.start, i - 1),
                fork=state(part.fork, i),
                merge=state(part.merge, i),
                end=state(part.end, i),
                skip=state(part.skip, i),
                branches=tuple(state(branch, -1) for branch in part.branches),
                pre_stays=True,
            )
        )
    return found

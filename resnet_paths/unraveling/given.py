"""The blocks of a network, for given values of inputs that they read, such as an attention mask.

Where a network is no chain of blocks as it stands, it may be one for any given value of some of its inputs. What blocks
and head read of these is context.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from resnet_paths._utils.errors import ResnetPathsError, UnravelError
from resnet_paths.unraveling.context import context_of
from resnet_paths.unraveling.merges import residual_additions, trunk_between
from resnet_paths.unraveling.parts import Options, Part
from resnet_paths.unraveling.plain import plain_parts
from resnet_paths.unraveling.residual import residual_parts
from resnet_paths.unraveling.tracing import IS_CONTEXT, Trace

__all__ = ["find_parts"]


def find_parts(traced: Trace, options: Options) -> tuple[Trace, list[Part], list[Node]]:
    """The blocks of a network, residual ones or else the modules of a plain net, and their context.

    Args:
        traced: The network's graph.
        options: What the caller says of the structure.

    Returns:
        The graph, where it was changed that of the changed one; the blocks in order, at least one; the values that the
        stem computes for blocks and head to read.

    Raises:
        UnravelError: If the network is not a chain; the node that breaks it is named.
    """
    if not traced.depends_on_input(traced.output):
        raise UnravelError("model", traced.output.name, "a model whose output depends on its input")
    found: list[list[Part]] = []
    refusal = None
    try:
        found.append(residual_parts(traced, options))
    except ResnetPathsError as error:
        refusal = error
    for given in _subsets(traced.inputs):
        found.append(_parts_given(traced.seen_from(traced.inputs, given), options))
    # The first of those with the most blocks: given nothing, where that gives as many.
    best = max(found, key=_number, default=[])
    additions = residual_additions(traced)
    # Chains that `max_depth` leaves out are not found in another way.
    is_whole = options.max_depth is None or not best
    if is_whole and len(best) < len(additions):
        seen = _parts_given(traced.seen_from([additions[0][0]]), options)
        best = max(best, seen, key=lambda parts: (_number(parts), len(parts)))
    if is_whole and len(best) < len(additions):
        traced, best = _with_early_values_as_context(traced, additions, best, options)
    if best:
        return traced, best, context_of(traced, best)
    if refusal is not None:
        raise refusal
    return traced, plain_parts(traced), []


def _with_early_values_as_context(
    traced: Trace, additions: Sequence[tuple[Node, Node]], found: list[Part], options: Options
) -> tuple[Trace, list[Part]]:
    """The graph and its blocks where several of these read what stands before the first addition.

    It is the first state, as in ``x = a * x + b * x_0``, or a value computed from it, such as the first layer's value
    in RWKV-7. What they read is a node of its own then. The old graph and the blocks found before, unless all residual
    additions are blocks in series so.

    Returns:
        The graph and the blocks.
    """
    first, addition = additions[0]
    reduced = traced.seen_from([first])
    early = {node for node in reduced.region([first], addition) if reduced.depends_on_input(node)}
    early = (early - {addition}) | {first}
    late = {node: [user for user in node.users if user not in early and user is not addition] for node in early}
    late = {node: users for node, users in late.items() if any(traced.comes_before(addition, user) for user in users)}
    num_reads = sum(map(len, late.values()))
    # A single one may be the end of a skip around all blocks, which is one with these inside.
    if num_reads == 0 or (num_reads == 1 and _number(found) >= len(additions)):
        return traced, found
    reads = {}
    for node in traced.in_order(late):
        with traced.graph.inserting_after(node):
            read = traced.graph.call_function(torch.ops.aten.alias.default, (node,))
        read.meta = {**node.meta, IS_CONTEXT: True}
        # The first block reads the first state as its state. Any other value is computed once, by the stem.
        readers = late[node] if node is first else list(node.users)
        node.replace_all_uses_with(read, delete_user_cb={*readers}.difference({read}).__contains__)
        reads[read] = node
    changed = Trace(traced.graph, traced.inputs, traced.output, traced.tensors)
    reduced = changed.seen_from([first], list(reads))
    parts = _parts_given(reduced, options)
    if parts:
        # ``f(x + x_0)`` adds what is read inside a branch.
        inside = set().union(*late.values()).difference(trunk_between(reduced, first, reduced.output))
        if len(parts) >= sum(node not in inside for _, node in additions):
            return changed, parts
    for read, node in reads.items():
        read.replace_all_uses_with(node)
        traced.graph.erase_node(read)
    return traced, found


def _number(parts: Sequence[Part]) -> int:
    """How many blocks there are, those inside branches counted.

    ``a * x + b * y`` with numbers a and b is no block: it mixes a second value into the state, such as the first one.

    Returns:
        Their number.
    """
    return sum((not part.is_mixture) + sum(map(_number, part.inner)) for part in parts)


def _subsets(inputs: Sequence[Node]) -> Iterator[tuple[Node, ...]]:
    """Which inputs to take as given: each alone, then all but one."""
    if len(inputs) > 1:
        yield from itertools.combinations(inputs, 1)
    if len(inputs) > 2:
        yield from itertools.combinations(inputs, len(inputs) - 1)


def _parts_given(reduced: Trace, options: Options) -> list[Part]:
    if not reduced.depends_on_input(reduced.output):
        return []
    try:
        return residual_parts(reduced, options)
    except ResnetPathsError:
        return []

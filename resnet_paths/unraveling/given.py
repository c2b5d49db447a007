"""Inputs that blocks read, such as an attention mask: given, and carried along beside what the blocks work on.

Where a network is no chain of blocks as it stands, it may be one for any given value of some of its inputs. The last
value that is made from these alone, and that everything behind the stem reads, is then part of every state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch.fx import Node

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.unraveling.carrying import read_beside
from resnet_paths.unraveling.parts import Part
from resnet_paths.unraveling.plain import plain_parts
from resnet_paths.unraveling.residual import residual_parts
from resnet_paths.unraveling.tracing import Trace

__all__ = ["find_parts"]


def find_parts(
    traced: Trace, max_depth: int | None, input_names: Sequence[str]
) -> tuple[Trace, list[Part], list[Node]]:
    """The blocks of a network, residual ones or else the modules of a plain net, and what is carried along.

    Args:
        traced: The network's graph.
        max_depth: How many chains may stand inside one another; None for any number.
        input_names: What to call the inputs in messages.

    Returns:
        The graph as the blocks see it; the blocks in order, at least one; the values that all of them are given.

    Raises:
        ResnetPathsError: If the network is not a chain; the node that breaks it is named.
    """
    if not traced.depends_on_input(traced.output):
        raise ResnetPathsError("model", traced.output.name, "a model whose output depends on its input")
    found: list[tuple[Trace, list[Part], list[Node]]] = []
    refusal = None
    try:
        found.append((traced, residual_parts(traced, max_depth), []))
    except ResnetPathsError as error:
        refusal = error
    unfit: dict[str, int] = {}
    for given in _subsets(traced.inputs):
        reduced = Trace(traced.graph, traced.inputs, traced.output, traced.tensors, given)
        parts = _parts_given(reduced, max_depth)
        carried = read_beside(traced, reduced, parts[0].start, traced.output) if parts else []
        if carried is None:
            names = (name for name, node in zip(input_names, traced.inputs, strict=True) if node in given)
            unfit[", ".join(names)] = _number(parts)
        else:
            found.append((reduced, parts, carried))
    # The first of those with the most blocks: given nothing, where that gives as many.
    best = max(found, key=lambda each: _number(each[1]), default=(traced, [], []))
    if max(unfit.values(), default=0) > _number(best[1]):
        raise ResnetPathsError(
            "example_inputs",
            max(unfit, key=unfit.__getitem__),
            "inputs that only the stem reads, or that have the batch, or one row for all, in dimension 0",
            "Blocks read this one. Leave it out, or wrap the model in a module that fixes it.",
        )
    if best[1]:
        return best
    if refusal is not None:
        raise refusal
    return traced, plain_parts(traced), []


def _number(parts: Sequence[Part]) -> int:
    """How many blocks there are, those inside branches counted."""
    return sum(1 + sum(map(_number, part.inner)) for part in parts) + sum(len(part.rungs) for part in parts)


def _subsets(inputs: Sequence[Node]) -> Iterator[tuple[Node, ...]]:
    """Which inputs to take as given: each alone, then all but one."""
    if len(inputs) > 1:
        yield from itertools.combinations(inputs, 1)
    if len(inputs) > 2:
        yield from itertools.combinations(inputs, len(inputs) - 1)


def _parts_given(reduced: Trace, max_depth: int | None) -> list[Part]:
    if not reduced.depends_on_input(reduced.output):
        return []
    try:
        parts = residual_parts(reduced, max_depth)
    except ResnetPathsError:
        return []
    return [] if any(part.rungs for part in parts) else parts

"""The blocks of a network, for given values of inputs that they read, such as an attention mask.

Where a network is no chain of blocks as it stands, it may be one for any given value of some of its inputs. What blocks
and head read of these is context.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch.fx import Node

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.unraveling.context import context_of
from resnet_paths.unraveling.parts import Options, Part
from resnet_paths.unraveling.plain import plain_parts
from resnet_paths.unraveling.residual import residual_parts
from resnet_paths.unraveling.tracing import Trace

__all__ = ["find_parts"]


def find_parts(traced: Trace, options: Options) -> tuple[list[Part], list[Node]]:
    """The blocks of a network, residual ones or else the modules of a plain net, and their context.

    Args:
        traced: The network's graph.
        options: What the caller says of the structure.

    Returns:
        The blocks in order, at least one; the values that the stem computes for blocks and head to read.

    Raises:
        ResnetPathsError: If the network is not a chain; the node that breaks it is named.
    """
    if not traced.depends_on_input(traced.output):
        raise ResnetPathsError("model", traced.output.name, "a model whose output depends on its input")
    found: list[list[Part]] = []
    refusal = None
    try:
        found.append(residual_parts(traced, options))
    except ResnetPathsError as error:
        refusal = error
    for given in _subsets(traced.inputs):
        reduced = Trace(traced.graph, traced.inputs, traced.output, traced.tensors, given)
        found.append(_parts_given(reduced, options))
    # The first of those with the most blocks: given nothing, where that gives as many.
    best = max(found, key=_number, default=[])
    if best:
        return best, context_of(traced, best)
    if refusal is not None:
        raise refusal
    return plain_parts(traced), []


def _number(parts: Sequence[Part]) -> int:
    """How many blocks there are, those inside branches counted."""
    return sum(1 + sum(map(_number, part.inner)) for part in parts)


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

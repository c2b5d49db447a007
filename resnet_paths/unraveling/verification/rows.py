"""Whether the output for an example depends on the other examples of its batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import sympy
import torch
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from resnet_paths._utils.errors import UnravelError
from resnet_paths.unraveling.graphs import is_shape
from resnet_paths.unraveling.tracing import Trace, describe, name_of
from resnet_paths.unraveling.verification.alone import Alone, Beside, run_or_refuse, unlike
from resnet_paths.unraveling.verification.claim import Claim

__all__ = ["check_rows", "check_size"]

_ALLOWED = "a model that treats each example of a batch alone, with the batch in dimension 0 of every tensor"
_ADVICE = (
    "Otherwise an example's own gradient and the effect of a lesion on it would depend on its batch. Use running "
    "statistics instead of those of the batch; transpose sequences so that the batch comes first."
)


@torch.no_grad()
def check_rows(claim: Claim, returned: torch.Tensor) -> Beside:
    """Check that an example's output does not depend on the other examples.

    Args:
        claim: The chain and the model.
        returned: The chain's output on the example.

    Returns:
        The first example beside one that is unlike those that were traced.

    Raises:
        UnravelError: If it does; the first operation that mixes examples is named.
    """
    batch = claim.batch
    batched = tuple(x.dim() > 0 and x.shape[0] == batch for x in claim.tensors)

    def pairs(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(function(x) if is_batched else x for x, is_batched in zip(claim.tensors, batched, strict=True))

    generator = torch.Generator().manual_seed(0)
    own = pairs(lambda x: x[:2] if batch > 1 else torch.cat([x, x]))
    given = Beside(batched, own, returned if batch == 2 else run_or_refuse(claim, claim.run_chain, own, "two examples"))
    other = pairs(lambda x: torch.cat([x[:1], unlike(x[:1], generator)]))
    try:
        beside = Beside(batched, other, claim.run_chain(other))
    except Exception:  # what is made up may be nothing that the model takes
        other = pairs(lambda x: torch.cat([x[:1], x[:1]]))
        beside = Beside(batched, other, run_or_refuse(claim, claim.run_chain, other, "the first example twice"))
    if not _is_equal(beside.rows(0)[1], given.rows(0)[1]):
        raise UnravelError("model", _culprit(claim, own, other), _ALLOWED, _ADVICE)
    return beside


def check_size(claim: Claim, alone: Alone) -> None:
    """Check that an example's output does not depend on the number of examples beside it.

    Args:
        claim: The chain and the model.
        alone: One example, and the chain's output for it alone and in a batch of two.

    Raises:
        UnravelError: If it does.
    """
    if not _is_near(alone.beside, alone.of_chain.detach()):
        what = f"{name_of(claim.model)}, whose output for an example depends on the size of its batch"
        raise UnravelError("model", what, _ALLOWED, _ADVICE)


def _is_equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two outputs of the same operations on as many numbers are equal; the same kernels ran."""
    if torch.equal(found, expected) or not found.is_floating_point():
        return torch.equal(found, expected)
    largest = float(expected.nan_to_num().abs().max())
    difference = float((found - expected).nan_to_num().abs().max())
    return difference <= 20 * torch.finfo(found.dtype).eps * largest


def _is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two outputs are equal except for rounding, which differs between batch sizes."""
    if found.shape != expected.shape or not found.is_floating_point():
        return torch.equal(found, expected)
    difference = (found - expected).nan_to_num().norm()
    return bool(difference <= 0.01 * expected.nan_to_num().norm() + torch.finfo(found.dtype).tiny)


def _culprit(claim: Claim, pair: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> str:
    """What mixes examples, for a message."""
    if claim.traced is not None:
        for node, values in _values_of_both(claim.traced, pair, other):
            if _mixes(claim.traced, node, *values):
                taken_of = node.all_input_nodes[0] if node.target is operator.getitem else node
                return f"{taken_of.name} ({describe(taken_of)}), which mixes the examples of a batch"
    return f"{name_of(claim.model)}, whose output for an example depends on the others of its batch"


def _values_of_both(
    traced: Trace, pair: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> Iterator[tuple[Node, tuple[Argument, Argument]]]:
    """Each node of a graph with its values on two batches; values are freed after their last use."""
    waiting = list(zip(pair, other, strict=True))
    last_use = {used: node for node in traced.graph.nodes for used in node.all_input_nodes}
    values: dict[Node, tuple[Argument, Argument]] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = waiting.pop(0)
        elif node.op == "get_attr":
            values[node] = (traced.tensors[node.target],) * 2
        elif node.op == "call_function":
            values[node] = (_result(node, values, 0), _result(node, values, 1))
        if node in values:
            yield node, values[node]
        for used in node.all_input_nodes:
            if last_use[used] is node:
                values.pop(used, None)


def _result(node: Node, values: Mapping[Node, Sequence[Argument]], which: int) -> Argument:
    """What a node's function returns for one of two batches."""

    def read(argument: Node) -> Argument:
        return values[argument][which]

    result: Argument = node.target(*map_arg(node.args, read), **map_arg(node.kwargs, read))  # type: ignore[operator]
    return result


def _mixes(traced: Trace, node: Node, one: Argument, other: Argument) -> bool:
    """Whether the part of a value that belongs to the first of two examples differs between two batches."""
    if is_shape(node) or not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    batch = {symbol for x in traced.inputs for symbol in _symbols(x.meta["val"].shape[:1])}
    dims = [dim for dim, size in enumerate(node.meta["val"].shape) if batch & _symbols([size])]
    if not dims:
        return not _is_equal(other, one)
    if len(dims) > 1:
        return True
    # The first half where examples follow one another, every second entry where they alternate.
    halves = [
        [x.narrow(dims[0], 0, x.shape[dims[0]] // 2), x.movedim(dims[0], 0)[::2].movedim(0, dims[0])]
        for x in (one, other)
    ]
    return not any(_is_equal(b, a) for a, b in zip(*halves, strict=True))


def _symbols(sizes: Iterable[object]) -> set[sympy.Symbol]:
    """The symbols in sizes that `torch.export` left free."""
    return set().union(*(size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt)))

"""In-place operations of an exported graph written as ordinary ones: ``x.relu_()`` becomes ``y = relu(x)``, read later.

What is written into a part of a tensor, as in ``x[:, t] = y``, becomes a new whole: ``select_scatter(x, y, 1, t)``.
Recurrent layers that are written as a loop over positions do so at every position.

`run_decompositions({})` does this for any graph, and traces it twice more; most networks need far less. Which values
share memory is read off the storages of the exporter's fake tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node, map_arg
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

__all__ = ["draws_random_numbers", "write_out_of_place"]

_ATEN = torch.ops.aten
_COPY = _ATEN.copy_.default
_INTO_WHOLE: dict[object, OpOverload] = {
    _ATEN.select.int: _ATEN.select_scatter.default,
    _ATEN.slice.Tensor: _ATEN.slice_scatter.default,
}
"""What reads a part of a tensor, and what returns the tensor with another such part."""


def write_out_of_place(graph: Graph) -> bool:
    """Rewrite every in-place operation of a graph, and take out what returns its operand as it is.

    Args:
        graph: What `torch.export.export` makes; it is changed only if all of it can be rewritten.

    Returns:
        Whether it was. Not so for a graph that changes its inputs, parameters or buffers, writes into a part of memory
        that is read later as something other than that part or the whole, calls functions that hold graphs, or draws
        random numbers.
    """
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    last_read = {node: max(map(position.__getitem__, node.users), default=-1) for node in nodes}
    sharing: defaultdict[int, list[Node]] = defaultdict(list)
    writes: dict[Node, _Write] = {}
    for node in nodes:
        if not _is_known(node):
            return False
        if _writes(node):
            x = node.all_input_nodes[0]
            earlier = [other for storage in _storages(x) for other in sharing[storage]]
            if not _can_be_ordinary(node) or any(n.op == "placeholder" for n in earlier):
                return False
            read_later = [n for n in dict.fromkeys([*earlier, node]) if last_read[n] > position[node]]
            cuts = _cuts(x)
            wholes = [x, *(cut.all_input_nodes[0] for cut in cuts)]
            places = {n: next((i for i, whole in enumerate(wholes) if _is_same(n, whole)), -1) for n in read_later}
            if -1 in places.values():
                return False
            outermost = max(places.values(), default=0)
            writes[node] = _Write(wholes[: outermost + 1], cuts[:outermost], places)
        for storage in _storages(node):
            sharing[storage].append(node)

    now: dict[Node, Node] = {}  # where to read what was in a node

    def current(node: Node) -> Node:
        return now.get(node, node)

    for node in nodes:
        node.args, node.kwargs = map_arg(node.args, current), map_arg(node.kwargs, current)
        if node in writes:
            write = writes[node]
            made = _written(node, write, [current(whole) for whole in write.wholes])
            now.update((read, made[place]) for read, place in write.places.items())
        elif node.op == "call_function" and node.all_input_nodes and _is_same(node, node.all_input_nodes[0]):
            now[node] = node.all_input_nodes[0]
    for node in reversed(nodes):
        if (node in now or node in writes or node.target in _INTO_WHOLE) and not node.users:
            graph.erase_node(node)
    return True


@dataclass(frozen=True)
class _Write:
    """What an in-place operation changes.

    Attributes:
        wholes: The tensor that is written, what it is a part of, what that is a part of, as far as it is read later.
        cuts: What reads each part from its whole.
        places: For each node that is read later, which of the wholes it is.
    """

    wholes: list[Node]
    cuts: list[Node]
    places: dict[Node, int]


def _cuts(part: Node) -> list[Node]:
    """What reads a node from what it is a part of, that from what it is a part of, and so on."""
    found = []
    while part.all_input_nodes:
        whole = part.all_input_nodes[0]
        if part.target in _INTO_WHOLE:
            found.append(part)
        elif not _is_same(part, whole):
            break
        part = whole
    return found


def _written(node: Node, write: _Write, before: Sequence[Node]) -> list[Node]:
    """The nodes that hold the wholes after a write, where those of `before` held them until then."""
    last = node

    def made(whole: Node, target: OpOverload, *args: Argument, **kwargs: Argument) -> Node:
        nonlocal last
        with node.graph.inserting_after(last):
            last = node.graph.call_function(target, args, kwargs)
        # Its value keeps the memory of the tensor that was written over, by which other names of it are recognised.
        last.meta = {**node.meta, "val": whole.meta["val"]}
        return last

    x = write.wholes[0]
    if node.target is _COPY:
        value = node.args[1]
        assert isinstance(value, Node)  # held by _can_be_ordinary
        wanted, given = x.meta["val"], value.meta["val"]
        if given.dtype is not wanted.dtype:
            value = made(x, _ATEN._to_copy.default, value, dtype=wanted.dtype)
        if str(given.shape) != str(wanted.shape):
            value = made(x, _ATEN.expand_as.default, value, before[0])
    else:
        ordinary = _ordinary(node)
        assert ordinary is not None  # held by _can_be_ordinary
        node.target, value = ordinary, node
    found = [value]
    for cut, whole, old in zip(write.cuts, write.wholes[1:], before[1:], strict=True):
        found.append(made(whole, _INTO_WHOLE[cut.target], old, found[-1], *cut.args[1:], **cut.kwargs))
    return found


def _is_known(node: Node) -> bool:
    """Whether it is an input, the output, a number, or one operation that draws nothing at random."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if not isinstance(node.target, OpOverload):
        return not isinstance(node.target, torch._ops.HigherOrderOperator)
    arguments = _arguments(node)
    return not arguments.get("train", arguments.get("training", False)) and not draws_random_numbers(node)


def draws_random_numbers(node: Node) -> bool:
    """Whether an operation draws random numbers as it is called; dropout does not in eval mode.

    Args:
        node: A node of an exported graph.

    Returns:
        Whether another run may give another result.
    """
    if not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    arguments = _arguments(node)
    is_training = arguments.get("train", arguments.get("training", True))
    return is_training is not False and arguments.get("dropout_p", 1) != 0  # attention is random only with dropout


def _arguments(node: Node) -> dict[str, object]:
    """The arguments of an operation by name, those left out by their defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip([a.name for a in schema], node.args, strict=False)) | node.kwargs
    return {a.name: a.default_value for a in schema if a.has_default_value()} | given


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable and not _is_dropout(node)


def _is_dropout(node: Node) -> bool:
    """Whether it is dropout in eval mode, which changes nothing."""
    return {"p", "train"} <= {argument.name for argument in node.target._schema.arguments}  # type: ignore[union-attr]


def _can_be_ordinary(node: Node) -> bool:
    """Whether an operation returns what an in-place one writes, or it copies into a part of a tensor."""
    if node.target is not _COPY:
        return _ordinary(node) is not None
    part, value = node.args[:2]
    if not isinstance(part, Node) or not isinstance(value, Node) or not _cuts(part):
        return False
    wanted, given = part.meta["val"], value.meta["val"]
    return bool(given.device == wanted.device and given.dim() <= wanted.dim())


def _ordinary(node: Node) -> OpOverload | None:
    """The operation that returns what an in-place one writes; None if there is none."""
    assert isinstance(node.target, OpOverload)  # held by _writes
    schema = node.target._schema
    written = [i for i, argument in enumerate(schema.arguments) if argument.is_write]
    namespace, _, name = schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if written != [0] or not name.endswith("_") or packet is None:
        return None
    if schema.overload_name not in [o.replace("default", "") for o in packet.overloads()]:
        return None
    found = getattr(packet, schema.overload_name or "default")
    if found._schema.is_mutable or [a.name for a in found._schema.arguments] != [a.name for a in schema.arguments]:
        return None
    # In place, a result keeps its dtype; otherwise the operands' dtypes, or the operation (y > 0), decide.
    args, kwargs = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    return found if found(*args, **kwargs).dtype is node.all_input_nodes[0].meta["val"].dtype else None


def _storages(node: Node) -> set[int]:
    """What tells the memory of a node's values apart from that of others."""
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _is_same(one: Node, other: Node) -> bool:
    """Whether two nodes are one tensor, entry for entry in memory, and of one gradient."""
    if not _storages(one) & _storages(other) or torch.ops.aten.detach.default in (one.target, other.target):
        return False
    pair = one.meta["val"], other.meta["val"]
    if not all(isinstance(value, torch.Tensor) for value in pair):
        return False
    a, b = ((v.dtype, str(v.shape), str(v.stride()), str(v.storage_offset()), v.is_conj(), v.is_neg()) for v in pair)
    return a == b

"""Several values of a graph in one tensor, so that a state of several values is one tensor all the same.

The blocks of a WaveNet work on a pair: the value x and a sum to which every block adds (van den Oord et al. 2016,
figure 4). A class token that attends to patches is a pair, too: blocks change the token and read the patches. Such
values are concatenated where their shapes allow it, and flattened first where they do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

__all__ = ["Packed", "pack", "values_of"]

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Packed:
    """Values that are in one tensor.

    Attributes:
        like: Nodes of the same shapes, one per part; their places in the tensor follow from them.
        values: The nodes that the tensor holds, one per part; None for zeros.
        dim: The dimension along which the parts are concatenated; None if they are flattened to [batch, number] first.
    """

    like: tuple[Node, ...]
    values: tuple[Node | None, ...]
    dim: int | None

    @property
    def name(self) -> str:
        """A name for the tensor in a graph."""
        return "_and_".join(node.name for node in self.values if node is not None)

    def holding(self, *values: Node | None) -> Packed:
        """A tensor of the same layout with other values."""
        return replace(self, values=values)

    @property
    def shape(self) -> tuple[int | torch.SymInt, ...]:
        """Shape of the tensor, with the batch."""
        first = self.like[0].meta["val"].shape
        if self.dim is None:
            return (first[0], sum(self._widths()))
        return (*first[: self.dim], sum(self._widths()), *first[self.dim + 1 :])

    def _widths(self) -> list[int | torch.SymInt]:
        if self.dim is None:
            return [node.meta["val"][0].numel() for node in self.like]
        return [node.meta["val"].shape[self.dim] for node in self.like]

    def unpacked(self, graph: Graph, tensor: Node) -> dict[Node, Node]:
        """The values as nodes of a new graph, cut out of the tensor.

        Args:
            graph: The new graph.
            tensor: Its node that holds the tensor.

        Returns:
            For each value that is no zero its copy.
        """
        dim, widths = 1 if self.dim is None else self.dim, self._widths()
        found = {}
        for i, (value, like) in enumerate(zip(self.values, self.like, strict=True)):
            if value is None or value in found:  # it may be held twice: for the blocks to change, and for later
                continue
            start = sum(widths[:i])
            part = graph.call_function(_ATEN.slice.Tensor, (tensor, dim, start, start + widths[i]))
            if self.dim is None:
                part = graph.call_function(_ATEN.reshape.default, (part, [-1, *like.meta["val"].shape[1:]]))
            found[value] = part
        return found

    def packed(self, graph: Graph, copies: Mapping[Node, Node]) -> Node:
        """The tensor as a node of a new graph.

        Args:
            graph: The new graph.
            copies: For each value its copy in the graph.

        Returns:
            The node.
        """
        present = [i for i, value in enumerate(self.values) if value is not None]
        widths = self._widths()
        parts: list[Node] = []
        for i in range(present[0], present[-1] + 1):
            value = self.values[i]
            assert value is not None  # zeros stand before or after all values
            part = copies[value]
            if value.meta["val"].shape[0] == 1 != self.like[0].meta["val"].shape[0]:  # one row for all examples
                batch = graph.call_function(_ATEN.sym_size.int, (parts[0] if parts else part, 0))
                rest = [-1] * (value.meta["val"].dim() - 1)
                part = graph.call_function(_ATEN.expand.default, (part, [batch, *rest]))
            parts.append(part if self.dim is not None else graph.call_function(_ATEN.flatten.using_ints, (part, 1)))
        dim = 1 if self.dim is None else self.dim
        whole = parts[0] if len(parts) == 1 else graph.call_function(_ATEN.cat.default, (parts, dim))
        pad = [sum(widths[: present[0]]), sum(widths[present[-1] + 1 :])]
        if any(pad):
            rank = 2 if self.dim is None else self.like[0].meta["val"].dim()
            whole = graph.call_function(_ATEN.constant_pad_nd.default, (whole, [*[0, 0] * (rank - 1 - dim), *pad]))
        return whole


def values_of(state: Node | Packed) -> list[Node]:
    """The nodes whose values a state holds."""
    return [state] if isinstance(state, Node) else [node for node in state.values if node is not None]


def pack(*values: Node) -> Packed | None:
    """Values in one tensor.

    Args:
        *values: Tensors with the batch in dimension 0, the first at least; others may have one row for all examples.

    Returns:
        Their layout; None if their dtypes differ or free sizes leave their places open.
    """
    tensors = [node.meta["val"] for node in values]
    if len({tensor.dtype for tensor in tensors}) > 1 or any(tensor.dim() < 2 for tensor in tensors):
        return None
    dim = _dimension(tensors)
    layout = Packed(values, values, dim)
    free = [width for width in layout._widths() if not isinstance(width, int)]
    fixed = dim is not None or all(isinstance(n, int) for tensor in tensors for n in tensor.shape[1:])
    # Parts are cut out, and zeros are padded, by numbers.
    return layout if fixed and not free else None


def _dimension(tensors: Sequence[torch.Tensor]) -> int | None:
    """The one dimension in which shapes differ, the first after the batch if in none; None if in several."""
    ranks = {tensor.dim() for tensor in tensors}
    if len(ranks) > 1:
        return None
    first = tensors[0].shape
    pairs = itertools.product(tensors[1:], range(1, len(first)))
    different = {i for tensor, i in pairs if str(tensor.shape[i]) != str(first[i])}
    if len(different) > 1:
        return None
    return min(different, default=1)

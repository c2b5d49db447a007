"""Routes and residual additions of a network, counted on its exported graph by a walk of its own.

Nothing here uses the library. The graph is a dictionary from each operation to those that it reads, as far as they
depend on the inputs. Where routes part is told by dominators: the nearest operation through which every route to an
operand leads. An addition or concatenation of two operands is residual if one of them holds more weight layers than
the other since they parted; that one is the branch, and both count as routes. Where operands meet in another way, as
queries and keys or a gate and what it scales, they are one route, as long as the longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

ROOT = "inputs"
_WEIGHT_LAYERS = ("conv1d", "conv2d", "conv3d", "convolution", "linear", "addmm", "mm", "matmul")
_JOINS = ("add", "add_", "cat")

Polynomial = dict[int, int]
"""Number of routes by length."""


def product(one: Polynomial, other: Polynomial) -> Polynomial:
    result: Counter[int] = Counter()
    for i, a in one.items():
        for j, b in other.items():
            result[i + j] += a * b
    return dict(result)


def total(*polynomials: Polynomial) -> Polynomial:
    result: Counter[int] = Counter()
    for polynomial in polynomials:
        result.update(polynomial)
    return dict(result)


def by_length(polynomial: Polynomial) -> list[int]:
    """Coefficients from the shortest route that there is: what all routes pass, such as stem and head, is no length."""
    return [polynomial.get(k, 0) for k in range(min(polynomial), max(polynomial) + 1)]


@dataclass
class Audit:
    """The walk over one graph.

    Attributes:
        sources: Operations that each operation reads, in order.
        names: The name of each operation's kind, such as "add".
        output: The operation that is returned.
        additions: The residual additions found, in order.
    """

    sources: dict[str, list[str]]
    names: dict[str, str]
    output: str
    additions: list[str] = field(default_factory=list)
    _dominator: dict[str, str] = field(default_factory=dict)
    _depth: dict[str, int] = field(default_factory=lambda: {ROOT: 0})
    _steps: dict[str, tuple[Polynomial, Polynomial]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node, sources in self.sources.items():
            self._dominator[node] = self._common(sources)
            self._depth[node] = self._depth[self._dominator[node]] + 1
            self._steps[node] = self._step(node)

    @property
    def blocks(self) -> list[int]:
        """Number of routes by the number of branches on them."""
        return by_length(self._between(ROOT, self.output)[0])

    @property
    def weight_layers(self) -> list[int]:
        """Number of routes by the number of weight layers in branches, from the shortest."""
        return by_length(self._between(ROOT, self.output)[1])

    def _common(self, nodes: Iterable[str]) -> str:
        first, *others = nodes
        for other in others:
            while first != other:
                if self._depth[first] < self._depth[other]:
                    other = self._dominator[other]
                else:
                    first = self._dominator[first]
        return first

    def _between(self, start: str, node: str) -> tuple[Polynomial, Polynomial]:
        """Routes from one of a node's dominators to it, by branches and by weight layers."""
        blocks, layers = {0: 1}, {0: 1}
        while node != start:
            own = self._steps[node]
            blocks, layers = product(blocks, own[0]), product(layers, own[1])
            node = self._dominator[node]
        return blocks, layers

    def _step(self, node: str) -> tuple[Polynomial, Polynomial]:
        """Routes from a node's dominator to it."""
        sources, start = self.sources[node], self._dominator[node]
        weighs = int(self.names[node] in _WEIGHT_LAYERS and len(sources) == 1)
        if len(sources) == 1:
            return {0: 1}, {weighs: 1}
        routes = [self._between(start, source) for source in sources]
        longest = [max(layers) for _, layers in routes]
        if self.names[node] not in _JOINS or len(sources) != 2 or max(longest) == 0:
            return {0: 1}, {max(longest): 1}
        self.additions.append(node)
        if longest[0] == longest[1]:  # alternatives, neither of which is a skip
            (blocks, layers), (more_blocks, more_layers) = routes
            return product({1: 1}, total(blocks, more_blocks)), total(layers, more_layers)
        branch = int(longest[1] > longest[0])
        skips = sum(routes[1 - branch][1].values())
        return (
            total(routes[1 - branch][0], product({1: 1}, routes[branch][0])),
            total({0: skips}, routes[branch][1]),
        )


def audit(model: nn.Module, *inputs: Any) -> Audit:
    """Export a model and walk over its graph.

    Args:
        model: A model in eval mode.
        inputs: Its positional arguments.

    Returns:
        Counts of the first tensor that it returns.
    """
    program = torch.export.export(model, inputs, strict=False).run_decompositions({})
    signature = program.graph_signature
    sources: dict[str, list[str]] = {name: [ROOT] for name in signature.user_inputs}
    names = dict.fromkeys(sources, "input")
    for node in program.graph.nodes:
        read = [x.name for x in node.all_input_nodes if x.name in sources]
        if node.op == "call_function" and read:
            sources[node.name] = read
            target = node.target
            names[node.name] = getattr(target, "overloadpacket", target).__name__
    return Audit(sources, names, signature.user_outputs[0])

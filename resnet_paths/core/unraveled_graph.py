"""The unraveled view as a graph: every path one route (Veit et al. 2016, figure 1b and equation 6)."""

from __future__ import annotations

import networkx as nx

from resnet_paths._utils.arguments import require_int
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.paths import HasPathChoices, Path, choices_of, entries_of, num_paths
from resnet_paths.core.polynomials import shown_count

__all__ = ["unraveled_graph"]


def unraveled_graph(chain: HasPathChoices | int, *, max_nodes: int = 100_000) -> nx.DiGraph:
    """The network written out as the paper's equation 6: each path is one route from ``"input"`` to ``"output"``.

    The output is y_n = y_{n-1} + f_n(y_{n-1}); both y_{n-1} are written out in the same way, and so on down to 2^n
    copies of the input. So f_n occurs once, f_1 2^(n-1) times. Nothing is multiplied out: branches are not
    linear, and f_n is applied to the whole sum that reaches it.

    A node is what a path through it has still to take: a whole path, as in ``(True, False, True)``, for a copy of the
    input; what is left of it after each block; ``"output"`` at the end. Where two routes meet they are added up.

    Args:
        chain: A chain, or a number of residual blocks.
        max_nodes: The largest graph to build; n residual blocks have 2^(n+1) nodes.

    Returns:
        A directed graph. Node attribute ``depth``: 0 for the input, i + 1 after i blocks. Edge attributes ``block``:
        index of the block, None for the edges out of the input; ``choice``: the entry, False = skip, True = branch.
        Graph attribute ``block_names``.

    Raises:
        ResnetPathsError: If the graph would have more than `max_nodes` nodes.

    Example:
        >>> graph = unraveled_graph(3)
        >>> len(graph), sum(1 for _ in nx.all_simple_paths(graph, "input", "output"))
        (16, 8)
    """
    choices = choices_of(chain)
    max_nodes = require_int("max_nodes", max_nodes, 1)
    width, num_nodes = 1, 2
    for choices_of_block in reversed(choices):  # no further than it may be built
        width *= num_paths([choices_of_block])
        num_nodes += width
        if num_nodes > max_nodes:
            raise ResnetPathsError(
                "chain",
                f"{len(choices)} blocks, {shown_count(num_paths(choices))} paths",
                f"a graph of at most {max_nodes} nodes",
                "Draw a shallower chain, use enumerate_paths, or raise max_nodes.",
            )
    names = [b.name for b in chain] if isinstance(chain, ResidualChain) else [f"block{i}" for i in range(len(choices))]
    graph = nx.DiGraph(block_names=names)
    graph.add_node("input", depth=0)
    graph.add_node("output", depth=len(choices) + 1)
    level: list[Path] = [()]
    for index in reversed(range(len(choices))):
        earlier = []
        offered = list(entries_of(choices[index]))
        for rest in level:
            for choice in offered:
                longer = (choice, *rest)
                graph.add_node(longer, depth=index + 1)
                graph.add_edge(longer, rest or "output", block=index, choice=choice)
                earlier.append(longer)
        level = earlier
    graph.add_edges_from((("input", path or "output") for path in level), block=None, choice=None)
    return graph

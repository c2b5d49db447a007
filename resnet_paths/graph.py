"""The unraveled view as a graph: every path one route (Veit et al. 2016, figure 1b)."""

from __future__ import annotations

import networkx as nx

from resnet_paths.chain import ResidualChain
from resnet_paths.errors import ResnetPathsError
from resnet_paths.paths import HasPathChoices, Path, choices_of

__all__ = ["unraveled_graph"]


def unraveled_graph(chain: HasPathChoices | int, *, max_nodes: int = 100_000) -> nx.DiGraph:
    """The tree of all paths, joined at the output: each path is exactly one route from ``"input"`` to ``"output"``.

    A node is what a path has taken so far: ``"input"`` for nothing, then the tuple of entries, as in ``(True, False)``
    for a path behind the second block. After block i there are as many nodes as distinct prefixes, 2^i with skips:
    module i sees 2^(i-1) different inputs, as the paper notes.

    Args:
        chain: A chain, or a number of residual blocks.
        max_nodes: The largest graph to build; 16 residual blocks have 131,072 nodes.

    Returns:
        A directed graph. Node attribute ``depth``: blocks passed. Edge attributes ``block``: index of the block, None
        for the edges into the output; ``choice``: the entry, False = skip, True = branch. Graph attribute
        ``block_names``.

    Raises:
        ResnetPathsError: If the graph would have more than `max_nodes` nodes.

    Example:
        >>> graph = unraveled_graph(3)
        >>> len(graph), sum(1 for _ in nx.all_simple_paths(graph, "input", "output"))
        (16, 8)
    """
    choices = choices_of(chain)
    widths = [1]
    for c in choices:
        widths.append(widths[-1] * len(c))
    if sum(widths) + 1 > max_nodes:
        raise ResnetPathsError(
            "chain", f"{len(choices)} blocks, {widths[-1]} paths, {sum(widths) + 1} nodes",
            f"a graph of at most {max_nodes} nodes",
            "Draw a shallower chain, use enumerate_paths, or raise max_nodes.",
        )  # fmt: skip
    names = [b.name for b in chain] if isinstance(chain, ResidualChain) else [f"block{i}" for i in range(len(choices))]
    graph = nx.DiGraph(block_names=names)
    graph.add_node("input", depth=0)
    level: list[tuple[Path, Path | str]] = [((), "input")]
    for index, offered in enumerate(choices):
        following: list[tuple[Path, Path | str]] = []
        for prefix, node in level:
            for choice in offered:
                longer = (*prefix, choice)
                graph.add_node(longer, depth=index + 1)
                graph.add_edge(node, longer, block=index, choice=choice)
                following.append((longer, longer))
        level = following
    graph.add_node("output", depth=len(choices) + 1)
    graph.add_edges_from(((node, "output") for _, node in level), block=None, choice=None)
    return graph

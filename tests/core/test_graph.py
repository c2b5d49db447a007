"""The unraveled graph: every path one route."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings

import resnet_paths as rp
from tests.chains import plans, random_chain


def routes(graph: nx.DiGraph) -> list[tuple]:
    """Entries along every route, by an independent walk."""
    found = []
    for nodes in nx.all_simple_paths(graph, "input", "output"):
        edges = [graph.edges[edge] for edge in nx.utils.pairwise(nodes)]
        assert [edge["block"] for edge in edges] == [None, *range(len(edges) - 1)]
        found.append(tuple(edge["choice"] for edge in edges[1:]))
    return found


@settings(max_examples=25, deadline=None)
@given(plans(max_blocks=5))
def test_routes_are_the_paths(plan):
    chain = random_chain(plan)
    found = routes(rp.unraveled_graph(chain))
    assert len(found) == chain.num_paths
    assert set(found) == set(rp.enumerate_paths(chain))


def test_nine_blocks_have_512_routes():
    assert sorted(routes(rp.unraveled_graph(9))) == sorted(rp.enumerate_paths(9))


def test_the_last_branch_stands_once_and_the_first_most_often():
    """As in equation 6 of Veit et al. 2016, written out for four blocks."""
    graph = rp.unraveled_graph(4)
    edges = [(d["block"], d["choice"]) for _, _, d in graph.edges(data=True)]
    assert [edges.count((i, True)) for i in range(4)] == [8, 4, 2, 1]
    assert {graph.in_degree(node) for node in graph if graph.nodes[node]["depth"] > 1} == {2}


def test_evaluating_the_graph_gives_the_output():
    """A sum at every meeting and a branch on every edge that takes one: the forward pass, on numbers."""
    branches = [lambda x: x**2, lambda x: 3 * x + 1, lambda x: -(x**3)]
    graph = rp.unraveled_graph(3)
    value = {"input": 0.7}
    for node in nx.topological_sort(graph):
        if node != "input":
            edges = [(value[tail], graph.edges[tail, node]) for tail in graph.predecessors(node)]
            value[node] = sum(branches[e["block"]](x) if e["choice"] else x for x, e in edges)
    expected = 0.7
    for branch in branches:
        expected = expected + branch(expected)
    assert value["output"] == pytest.approx(expected)


def test_names_are_the_blocks():
    chain = random_chain((2, ()), seed=0)
    assert rp.unraveled_graph(chain).graph["block_names"] == []
    assert rp.unraveled_graph(2).graph["block_names"] == ["block0", "block1"]


def test_too_large_is_refused_before_anything_is_built():
    with pytest.raises(rp.ResnetPathsError, match=r"54 blocks, 18,014,398,509,481,984 paths.*at most 100000 nodes"):
        rp.unraveled_graph(54)
    with pytest.raises(rp.ResnetPathsError, match="at most 15 nodes"):
        rp.unraveled_graph(3, max_nodes=15)
    assert len(rp.unraveled_graph(3, max_nodes=16)) == 16

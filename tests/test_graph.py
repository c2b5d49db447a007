"""The unraveled graph: every path one route."""

from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given, settings
from tests.chains import plans, random_chain

import resnet_paths as rp


def routes(graph: nx.DiGraph) -> list[tuple]:
    """Entries along every route, by an independent walk."""
    found = []
    for nodes in nx.all_simple_paths(graph, "input", "output"):
        edges = [graph.edges[edge] for edge in nx.utils.pairwise(nodes)]
        assert [edge["block"] for edge in edges] == [*range(len(edges) - 1), None]
        found.append(tuple(edge["choice"] for edge in edges[:-1]))
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


def test_block_i_sees_twice_as_many_inputs_as_the_one_before():
    graph = rp.unraveled_graph(4)
    edges = [(d["block"], d["choice"]) for _, _, d in graph.edges(data=True)]
    assert [edges.count((i, True)) for i in range(4)] == [1, 2, 4, 8]


def test_names_are_the_blocks():
    chain = random_chain((2, ()), seed=0)
    assert rp.unraveled_graph(chain).graph["block_names"] == []
    assert rp.unraveled_graph(2).graph["block_names"] == ["block0", "block1"]


def test_too_large_is_refused_before_anything_is_built():
    with pytest.raises(rp.ResnetPathsError, match=r"54 blocks, 18014398509481984 paths.*at most 100000 nodes"):
        rp.unraveled_graph(54)
    with pytest.raises(rp.ResnetPathsError, match="at most 15 nodes"):
        rp.unraveled_graph(3, max_nodes=15)
    assert len(rp.unraveled_graph(3, max_nodes=16)) == 16

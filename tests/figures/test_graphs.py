"""The drawing of the unraveled graph: boxes, edges and the path that is highlighted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import networkx as nx
import pytest

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures import (
    paper_style,
    plot_unraveled_graph,
)
from tests.figures.frames import boxes, routes, texts


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_branch_i_stands_as_often_as_the_paper_writes_it_out(n: int) -> None:
    with paper_style("double"):
        ax = plot_unraveled_graph(rp.unraveled_graph(n))
    assert boxes(ax) == sorted(f"$f_{{{i}}}$" for i in range(1, n + 1) for _ in range(2 ** (n - i)))
    assert len(boxes(ax)) == 2**n - 1
    assert {"input", "output"} <= set(texts(ax))
    assert not ax.axison


def test_every_edge_is_drawn_from_depth_to_depth() -> None:
    graph = rp.unraveled_graph(3)
    ax = plot_unraveled_graph(graph)
    drawn = [(round(curve[0][0], 6), round(curve[-1][0], 6)) for curve in routes(ax, "routes")]
    edges = [(graph.nodes[tail]["depth"], graph.nodes[head]["depth"]) for tail, head in graph.edges]
    inside = [ends for ends in drawn if ends[0] >= 0 and ends[1] <= 4]
    assert sorted(inside) == sorted(edges)
    assert len(drawn) == len(edges) + 2  # and a stub on either side
    leaving = [curve for curve in routes(ax, "routes") if curve[0][0] == 0]
    assert len({curve[-1][1] for curve in leaving}) == 8
    assert len({tuple(curve[0]) for curve in leaving}) == 1


@pytest.mark.parametrize("path", list(rp.enumerate_paths(3)))
def test_highlight_is_one_route_from_end_to_end(path: tuple[bool, ...]) -> None:
    ax = plot_unraveled_graph(rp.unraveled_graph(3), highlight=path)
    curves = sorted(routes(ax, "highlighted-route"), key=lambda curve: curve[0][0])
    assert len(curves) == 6  # a stub, the way to the copy of the input, three blocks, a stub
    for left, right in itertools.pairwise(curves):
        assert left[-1] == pytest.approx(right[0])
    # At a sum the skip comes from above, the branch from below.
    assert [bool(curve[-1][1] > curve[0][1]) for curve in curves[2:5]] == list(path)
    filled = [text.get_text() for text in ax.texts if text.get_bbox_patch() and text.get_color() == "white"]
    assert sorted(filled) == [f"$f_{{{i + 1}}}$" for i, entry in enumerate(path) if entry]
    assert len(routes(ax, "routes")) == 22 - 4
    assert len(boxes(ax)) == 7


@pytest.mark.parametrize("n", [5, 6, 7])
def test_many_paths_keep_their_boxes_but_not_labels_that_nobody_can_read(n: int) -> None:
    ax = plot_unraveled_graph(rp.unraveled_graph(n))
    assert boxes(ax) == []
    assert sum(drawn.get_marker() == "s" for drawn in ax.lines) == 2**n - 1


@pytest.mark.parametrize(("column", "n"), [("single", 3), ("single", 4), ("double", 4), ("double", 5)])
def test_labels_do_not_overlap(column: Any, n: int) -> None:
    with paper_style(column):
        fig = plt.figure()
        ax = plot_unraveled_graph(rp.unraveled_graph(n))
        fig.draw_without_rendering()
        assert len(boxes(ax)) == 2**n - 1
        extents = [(t.get_bbox_patch() or t).get_window_extent() for t in ax.texts]
        for index, extent in enumerate(extents):
            assert not any(extent.overlaps(other) for other in extents[index + 1 :])
        assert min(text.get_size() for text in ax.texts) >= 4


class Mixed:
    """A block with two branches, one without skip, one that was deleted."""

    path_choices = ((False, True, 2), (True,), (False,))

    def __iter__(self) -> Iterator[Any]:
        return iter([type("Block", (), {"name": name}) for name in "abc"])


def test_parallel_branches_are_numbered_and_what_is_deleted_has_no_box() -> None:
    ax = plot_unraveled_graph(rp.unraveled_graph(Mixed()), highlight=(2, True, False))
    assert boxes(ax) == sorted(["$f_{1,1}$", "$f_{1,2}$", "$f_{2}$"])
    filled = [text.get_text() for text in ax.texts if text.get_bbox_patch() and text.get_color() == "white"]
    assert sorted(filled) == ["$f_{1,2}$", "$f_{2}$"]


def test_paths_and_graphs_that_do_not_exist_are_refused() -> None:
    graph = rp.unraveled_graph(3)
    with pytest.raises(ResnetPathsError, match=r"^path: got \(True,\); allowed: 3 entries, one per block"):
        plot_unraveled_graph(graph, highlight=(True,))
    with pytest.raises(ResnetPathsError, match=r"^path\[1\]: got 2; allowed: one of \(False, True\)"):
        plot_unraveled_graph(graph, highlight=(True, 2, False))
    foreign = nx.DiGraph([("input", "middle"), ("middle", "output")])
    without_a_block = rp.unraveled_graph(2)
    nx.set_edge_attributes(without_a_block, dict.fromkeys(without_a_block.out_edges("input"), 5), "block")
    for wrong in (nx.path_graph(3), nx.DiGraph([(0, 1)]), foreign, without_a_block, "graph"):
        with pytest.raises(ResnetPathsError, match=r"^graph: got .*a graph from resnet_paths.unraveled_graph\. Call"):
            plot_unraveled_graph(wrong)
    assert plt.get_fignums() == []


def test_no_blocks_is_one_path() -> None:
    ax = plot_unraveled_graph(rp.unraveled_graph(0), highlight=())
    assert len(routes(ax, "highlighted-route")) == 3
    assert routes(ax, "routes") == []

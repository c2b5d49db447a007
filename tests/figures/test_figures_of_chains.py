"""Drawings of whole chains: every block once, repeats folded, one path or lesion told from the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Parallel, Placed
from resnet_paths.figures import paper_style, plot_chain, plot_unraveled_graph
from tests.figures.frames import boxes, legend_texts, routes, texts


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield


def block(name: str, kind: str = "identity", **changes: Any) -> Block:
    skips = {"identity": nn.Identity(), "projection": nn.Linear(4, 4), "concat": Placed(1, 0, 2), "none": None}
    branch = changes.pop("branch", None) or nn.Linear(4, 4)
    shapes = {"in_shape": (4,), "out_shape": (4,)} | changes
    return Block(branch, skips[kind], name=name, **shapes)


def chain(blocks: Sequence[Block]) -> ResidualChain:
    return ResidualChain(nn.Identity(), blocks, nn.Identity())


def resnet_110() -> ResidualChain:
    """54 blocks in three stages, of which two begin with a projection."""
    blocks = []
    for stage, width in enumerate((16, 32, 64), start=1):
        for i in range(18):
            new = stage > 1 and i == 0
            shapes = {"in_shape": (width // 2 if new else width, 8), "out_shape": (width, 8)}
            pre = {"pre": nn.ReLU()} if new else {}
            blocks.append(block(f"layer{stage}.{i}", "projection" if new else "identity", **shapes, **pre))
    return chain(blocks)


def transformer() -> ResidualChain:
    norm, attention, mlp = nn.LayerNorm(4), nn.Bilinear(4, 4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU())
    return chain([
        block(f"layers.{i}.{name}", branch=nn.Sequential(norm, part))
        for i in range(12)
        for name, part in (("attn", attention), ("mlp", mlp))
    ])


def side_by_side() -> ResidualChain:
    return chain([block(f"h.{i}", branch=Parallel([nn.Linear(4, 4), nn.Bilinear(4, 4, 4)])) for i in range(6)])


def u_net() -> ResidualChain:
    bottom = chain([block("bottom.0"), block("bottom.1")])
    inside = chain([block("below", "concat", branch=bottom)])
    return chain([block("level", "concat", branch=inside, post=nn.ReLU(), out_shape=(6,))])


def dense_net() -> ResidualChain:
    sizes = [4 + 2 * i for i in range(7)]
    return chain([block(f"layers.{i}", "concat", in_shape=(sizes[i],), out_shape=(sizes[i + 1],)) for i in range(6)])


CHAINS = {f.__name__: f for f in (resnet_110, transformer, side_by_side, u_net, dense_net)}
DRAWN: dict[str, tuple[list[str], list[str], list[str]]] = {
    # name: (labels in boxes, numbers of times, words in the legend)
    "resnet_110": (["0…17", "18", "19…35", "36", "37…53"], ["× 18", "× 17", "× 17"], ["projection"]),
    "transformer": (["0…22", "1…23"], ["× 12"], []),
    "side_by_side": (["0…5:1", "0…5:2"], ["× 6"], []),
    "u_net": (["0…1"], ["× 2"], ["concatenation"]),
    "dense_net": (["0…5"], ["× 6"], ["concatenation"]),
}


def marked(ax: Axes, gid: str) -> list[Any]:
    return [artist for artist in ax.get_children() if artist.get_gid() == gid]


def in_boxes(ax: Axes) -> list[str]:
    return [text.get_text() for text in marked(ax, "label")]


@pytest.mark.parametrize("name", CHAINS)
def test_blocks_alike_are_drawn_once_with_their_number(name: str) -> None:
    labels, times, legend = DRAWN[name]
    with paper_style("double", aspect=0.3):
        ax = plot_chain(CHAINS[name]().to_frame())
    assert in_boxes(ax) == labels
    assert [text.get_text() for text in marked(ax, "times")] == times
    assert legend_texts(ax) == legend
    assert len(marked(ax, "branch-box")) == len(labels)
    assert not ax.axison
    assert {"input", "output"} <= set(texts(ax))


def test_names_and_shapes_are_those_of_the_run() -> None:
    with paper_style("double", aspect=0.3):
        ax = plot_chain(resnet_110().to_frame())
    names = [text.get_text() for text in marked(ax, "name")]
    assert names == ["layer1", "layer2.0", "layer2", "layer3.0", "layer3"]
    assert [text.get_text() for text in ax.texts if text.get_gid() == "shape"] == ["16x8", "32x8", "64x8"]
    assert len(marked(ax, "projection")) == 2
    assert len(routes(ax, "skip")) == 5
    assert len(routes(ax, "branch")) == 2 * 5
    assert len(routes(ax, "tick")) == 2


def test_a_deleted_branch_is_crossed_out_and_not_folded_with_the_others() -> None:
    lesioned = rp.delete_blocks(resnet_110(), [3, 7, 8])
    with paper_style("double", aspect=0.3):
        ax = plot_chain(lesioned.to_frame())
    assert in_boxes(ax)[:3] == ["0…2", "4…6", "9…17"]
    assert len(marked(ax, "deleted-branch")) == 1 + 3  # one alone; two folded, which have two copies drawn behind
    assert legend_texts(ax) == ["projection", "deleted branch"]
    assert len(routes(ax, "skip")) == 9
    assert len(routes(ax, "branch")) == 2 * 7


def test_a_path_is_one_line_from_end_to_end() -> None:
    path = [0] * 54
    for taken in (2, 18, 19, 20, 53):
        path[taken] = 1
    with paper_style("double", aspect=0.3):
        ax = plot_chain(resnet_110().to_frame(), highlight=path)
    filled = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_gid() == "branch-box"]
    on = [p for p in filled if p.get_facecolor() == mpl.colors.to_rgba("C0")]
    assert len(on) == 4  # 2; 18; 19 and 20; 53
    labels = in_boxes(ax)
    assert labels == ["0…1", "2", "3…17", "18", "19…20", "21…35", "36", "37…52", "53"]
    assert len(routes(ax, "highlighted-branch")) == 2 * 4
    assert len(routes(ax, "highlighted-skip")) == 5
    # Every piece begins where another ends, but for the boxes, at which both sides of a branch end.
    ends = sorted(
        curve[i][0] for kind in ("skip", "trunk") for curve in routes(ax, f"highlighted-{kind}") for i in (0, -1)
    )
    ends += [curve[0][0] for curve in routes(ax, "highlighted-branch")]
    rounded = sorted(round(float(x), 6) for x in ends)
    assert rounded[1:-1:2] == rounded[2:-1:2]
    assert len(rounded) % 2 == 0


def test_a_path_through_chains_inside_branches() -> None:
    frame = u_net().to_frame()
    ax = plot_chain(frame, highlight=((((0, 1)),),))
    assert in_boxes(ax) == ["0", "1"]
    assert len(routes(ax, "highlighted-branch")) == 2 * 3
    assert len(routes(ax, "highlighted-skip")) == 1
    past = plot_chain(frame, plt.figure().subplots(), highlight=(0,))
    assert len(routes(past, "highlighted-branch")) == 0
    assert len(routes(past, "highlighted-skip")) == 1


def test_one_of_several_branches() -> None:
    ax = plot_chain(side_by_side().to_frame(), highlight=(0, 2, 1, 0, 0, 0))
    on = [text.get_text() for text in ax.texts if text.get_color() == "white"]
    assert on == ["1:2", "2:1"]


@pytest.mark.parametrize("width", ["single", "double"])
@pytest.mark.parametrize("name", CHAINS)
def test_nothing_overlaps_or_sticks_out(name: str, width: Any) -> None:
    with paper_style(width, aspect=0.5):
        ax = plot_chain(CHAINS[name]().to_frame())
        figure = ax.figure
        figure.draw_without_rendering()
        found = [text.get_window_extent() for text in ax.texts]
        for index, extent in enumerate(found):
            assert not any(extent.overlaps(other) for other in found[index + 1 :]), ax.texts[index]
            assert figure.bbox.x0 <= extent.x0 <= extent.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= extent.y0 <= extent.y1 <= figure.bbox.y1
        assert min(text.get_size() for text in ax.texts) >= 4


def test_the_frame_says_what_every_block_holds() -> None:
    frame = rp.delete_block(u_net(), "bottom.1").to_frame()
    assert frame.block.tolist() == ["level", "below", "bottom.0", "bottom.1"]
    assert frame.depth.tolist() == [0, 1, 2, 2]
    assert frame["index"].tolist() == [0, 0, 0, 1]
    assert frame.skip.tolist() == ["concat", "concat", "identity", "identity"]
    assert frame.num_branches.tolist() == [1, 1, 1, 0]
    assert frame["after"].tolist() == ["ReLU", "", "", ""]
    assert frame.branch.tolist() == ["chain of 1 blocks", "chain of 2 blocks", "Linear", "deleted"]
    placed = chain([block("layer", "concat", branch=nn.Sequential(nn.Linear(4, 2), Placed(1, 4, 0)), out_shape=(6,))])
    assert placed.to_frame().branch.tolist() == ["Linear"]
    assert side_by_side().to_frame().num_branches.tolist() == [2] * 6
    assert "    bottom.0" in u_net().summary()
    assert "num_branches" not in u_net().summary()
    empty = chain([])
    assert empty.summary() == "ResidualChain of 0 blocks, 1 paths, 0 parameters"
    assert "0 blocks" in empty._repr_html_()


def test_frames_and_paths_of_another_kind_are_refused() -> None:
    frame = resnet_110().to_frame()
    for wrong in (frame.drop(columns="depth"), frame.iloc[:0], pd.DataFrame(), resnet_110()):
        with pytest.raises(rp.ResnetPathsError, match=r"frame: got .*Call plot_chain\(chain.to_frame\(\)\)"):
            plot_chain(wrong)
    with pytest.raises(rp.ResnetPathsError, match=r"path: got \(1, 0\); allowed: 54 entries"):
        plot_chain(frame, highlight=(1, 0))
    with pytest.raises(rp.ResnetPathsError, match=r"path\[3\]: got 1; allowed: one of \(False,\)"):
        plot_chain(rp.delete_block(resnet_110(), 3).to_frame(), highlight=[1] * 54)
    assert plt.get_fignums() == []


def test_the_unraveled_view_of_a_chain_inside_a_branch() -> None:
    inner = chain([block("inner.0"), block("inner.1")])
    graph = rp.unraveled_graph(chain([block("outer", branch=inner), block("last")]))
    path = ((True, False), True)
    ax = plot_unraveled_graph(graph, highlight=path)
    # Once f_2, twice each of the four paths through the chain inside f_1.
    assert sorted(boxes(ax)) == sorted(["$f_{2}$", *[f"$f_{{1,{i}}}$" for i in (1, 2, 3, 4)] * 2])
    filled = [text.get_text() for text in ax.texts if text.get_bbox_patch() and text.get_color() == "white"]
    assert sorted(filled) == ["$f_{1,3}$", "$f_{2}$"]
    with pytest.raises(rp.ResnetPathsError, match=r"path\[0\]: got True; allowed: one of \(False, \(False, False\)"):
        plot_unraveled_graph(graph, highlight=(True, True))

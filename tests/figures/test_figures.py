"""Figures: the numbers drawn are the numbers of the frame, and the files are what a publisher asks for."""

from __future__ import annotations

import colorsys
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures import (
    paper_style,
    plot_path_histogram,
    plot_single_deletions,
    plot_training_curves,
    plot_unraveled_graph,
    save_figure,
    weights_hash,
)
from resnet_paths.figures import style as paper

KINDS = ("pdf", "svg", "png", "csv")


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield


def deletions(network: str = "preact-resnet-56", num_blocks: int = 27, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    rate = generator.uniform(0.08, 0.9, num_blocks)
    return pd.DataFrame({
        "network": network,
        "block_index": range(num_blocks),
        "error_rate": rate,
        "error_rate_low": rate - 0.03,
        "error_rate_high": rate + 0.02,
        "intact_error_rate": 0.07 + 0.01 * seed,
    })


def published() -> pd.DataFrame:
    return pd.DataFrame({
        "network": "preact-resnet-20",
        "dataset": "CIFAR-10",
        "block_index": [0, 1, 2],
        "error_percent": [69.98, 19.97, 44.74],
        "intact_error_percent": 8.495,
    })


def curves() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [
        {"network": network, "seed": seed, "epoch": epoch, "train_loss": 3 * generator.random()}
        | {name: generator.random() for name in ("train_error_rate", "test_loss", "test_error_rate")}
        for network in ("residual", "plain")
        for seed in range(3)
        for epoch in range(1, 6)
    ]
    return pd.DataFrame(rows)


def histograms() -> pd.DataFrame:
    return pd.concat([rp.path_histogram(n).assign(network=f"{n} blocks") for n in (9, 27)])


PLOTS: dict[str, Callable[[], Axes]] = {
    "histogram": lambda: plot_path_histogram(histograms()),
    "deletions": lambda: plot_single_deletions(deletions(), published=published(), stage_starts=[9, 18], chance=0.9),
    "graph": lambda: plot_unraveled_graph(rp.unraveled_graph(3), highlight=(True, False, True)),
    "curves": lambda: plot_training_curves(curves()),
}


def line(ax: Axes, label: str) -> np.ndarray[Any, Any]:
    (found,) = [drawn for drawn in ax.lines if drawn.get_label() == label]
    return np.asarray(found.get_xydata())


def legend_texts(ax: Axes) -> list[str]:
    return [text.get_text() for legend in ax.findobj(Legend) for text in legend.get_texts()]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def routes(ax: Axes, gid: str) -> list[np.ndarray[Any, Any]]:
    collections = [c for c in ax.collections if isinstance(c, PathCollection) and c.get_gid() == gid]
    return [path.vertices for collection in collections for path in collection.get_paths()]


# paper_style


@pytest.mark.parametrize(("column", "inches"), [("single", 3.25), ("double", 6.75), (5, 5.0), (4.2, 4.2)])
def test_figures_have_the_width_of_the_column(column: Any, inches: float) -> None:
    with paper_style(column, aspect=0.5):
        assert tuple(plt.figure().get_size_inches()) == (inches, inches / 2)


def test_style_is_readable_and_restored() -> None:
    before = dict(mpl.rcParams)
    with paper_style("double"):
        fig, ax = plt.subplots()
        assert ax.xaxis.label.get_size() == 8
        assert min(tick.get_size() for tick in ax.get_xticklabels()) >= 7
        assert not ax.spines["top"].get_visible()
        assert not ax.spines["right"].get_visible()
        assert type(fig.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
        assert mpl.rcParams["pdf.fonttype"] == mpl.rcParams["ps.fonttype"] == 42
    assert dict(mpl.rcParams) == before


def test_first_colours_can_be_told_apart_in_grey() -> None:
    colours = [to_rgb(f"C{index}") for index in range(3)]
    luminances = sorted(float(np.dot(colour, (0.2126, 0.7152, 0.0722))) for colour in colours)
    assert min(np.diff(luminances)) > 0.05
    assert len({round(colorsys.rgb_to_hsv(*colour)[0], 1) for colour in colours}) == 3


@pytest.mark.parametrize("column", ["triple", 0, -1.0, float("nan"), float("inf"), True, None])
def test_unknown_width_is_refused_before_anything_changes(column: Any) -> None:
    with pytest.raises(ResnetPathsError, match=r"^column: got .*allowed: 'single', 'double', or a width in inches"):
        paper_style(column)


def test_aspect_must_be_positive() -> None:
    with pytest.raises(ResnetPathsError, match=r"^aspect: got 0;"):
        paper_style("single", aspect=0)


# save_figure


@pytest.mark.parametrize("width", [3.25, 6.75])
def test_pdf_page_is_the_figure_and_its_fonts_are_truetype(tmp_path: Path, width: float) -> None:
    # A tight box in the caller's settings, and no paper style: the page must keep its width all the same.
    with mpl.rc_context({"savefig.bbox": "tight", "pdf.fonttype": 3}):
        fig = plt.figure(figsize=(width, 2))
        fig.add_subplot(xlabel="length", ylabel=r"$f_1$")
        pdf = save_figure(fig, tmp_path / "page")[0].read_bytes()
    (box,) = re.findall(rb"/MediaBox \[ ?([^\]]*?) ?\]", pdf)
    assert [float(number) for number in box.split()] == [0, 0, 72 * width, 144]
    assert pdf.count(b"/FontFile2") >= 2
    assert b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf


def test_png_has_300_dots_an_inch(tmp_path: Path) -> None:
    fig = plt.figure(figsize=(3.25, 2))
    pixels = plt.imread(save_figure(fig, tmp_path / "page")[2])
    assert pixels.shape[:2] == (600, 975)


@pytest.mark.parametrize("name", PLOTS)
def test_same_data_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    saved = []
    for attempt in ("first", "again", "anew"):
        if attempt != "again":  # the same figure once more: a layout that drifts would show
            plt.close("all")
            ax = PLOTS[name]()
        paths = save_figure(ax.figure, tmp_path / attempt / "figure", data=deletions())
        assert [path.name for path in paths] == [f"figure.{kind}" for kind in KINDS]
        saved.append([path.read_bytes() for path in paths])
    assert saved[0] == saved[1] == saved[2]


def test_a_colorbar_stays_where_it_is(tmp_path: Path) -> None:
    fig, ax = plt.subplots()
    fig.colorbar(ax.pcolormesh(np.arange(12.0).reshape(3, 4)), label="interaction")
    saved = [[path.read_bytes() for path in save_figure(fig, tmp_path / name / "figure")] for name in ("one", "two")]
    assert saved[0] == saved[1]


def test_a_figure_keeps_its_layout_when_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fig = plt.figure()
    engine = fig.get_layout_engine()
    monkeypatch.setattr(fig, "savefig", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_figure(fig, tmp_path / "figure")
    assert fig.get_layout_engine() is engine


def test_files_say_where_they_come_from_but_not_when(tmp_path: Path) -> None:
    PLOTS["histogram"]()
    net = torch.nn.Linear(2, 2)
    facts = f"mine sha256 {weights_hash(net)}; seed 3"
    for path in save_figure(plt.gcf(), tmp_path / "figure", networks={"mine": net}, seed=3):
        content = path.read_bytes()
        for word in (f"resnet_paths {rp.__version__}", f"torch {torch.__version__}", mpl.__version__, facts):
            assert word.encode() in content, (path.name, word)
        for word in (b"CreationDate", b"dc:date", b"Producer", b"http://matplotlib.org"):
            assert word not in content, (path.name, word)
    assert Image.open(path).text == {"Software": paper._VERSIONS, "Description": facts}
    save_figure(plt.gcf(), tmp_path / "none")
    assert set(Image.open(tmp_path / "none.png").text) == {"Software"}


def test_weights_have_one_hash_in_model_and_chain_and_another_when_they_change() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.again = torch.nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.first(x)
            return x + self.again(x)

    model = Tied().eval()
    chain = rp.unravel(model, torch.ones(2, 3, dtype=torch.float64))
    before = weights_hash(model)
    assert re.fullmatch("[0-9a-f]{16}", before)
    assert weights_hash(chain) == before
    with torch.no_grad():
        model.first.bias[0] += 1e-12
    assert weights_hash(model) == weights_hash(chain) != before


@pytest.mark.parametrize("networks", ["preact-resnet-20", {"mine": 3}])
def test_what_is_no_network_is_refused(tmp_path: Path, networks: Any) -> None:
    with pytest.raises(ResnetPathsError, match=r"^networks: got .* allowed: a network, or a mapping from names"):
        save_figure(plt.figure(), tmp_path / "a", networks=networks)
    assert not list(tmp_path.iterdir())


def test_frame_is_saved_exactly(tmp_path: Path) -> None:
    frame = rp.path_histogram(80)
    path = save_figure(plt.figure(), tmp_path / "figure", data=frame)[-1]
    text = path.read_bytes().decode()
    assert "\r" not in text
    read = pd.read_csv(path, dtype={"num_paths": object})
    assert [int(count) for count in read["num_paths"]] == list(frame["num_paths"])
    assert (read["fraction"] == frame["fraction"]).all()


def test_dots_in_a_stem_are_kept(tmp_path: Path) -> None:
    assert [path.name for path in save_figure(plt.figure(), tmp_path / "fig1.5")] == [
        "fig1.5.pdf",
        "fig1.5.svg",
        "fig1.5.png",
    ]


@pytest.mark.parametrize("stem", ["a.pdf", "a.svg", "a.PNG", "a.csv", "", ".."])
def test_stems_with_a_suffix_or_without_a_name_are_refused(tmp_path: Path, stem: str) -> None:
    with pytest.raises(ResnetPathsError, match=r"^stem: got .*without \.pdf, \.svg, \.png, \.csv"):
        save_figure(plt.figure(), f"{tmp_path}/{stem}" if stem not in {"", ".."} else stem)
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_figure_or_a_frame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResnetPathsError, match=r"^fig: got 'Axes'; allowed: a matplotlib Figure. For Axes, pass"):
        save_figure(plt.gca(), tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(ResnetPathsError, match=r"^data: got 'dict'; allowed: a pandas DataFrame"):
        save_figure(plt.figure(), tmp_path / "a", data={})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["svg", "png", "csv"])
def test_a_failure_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    paths = save_figure(plt.figure(), tmp_path / "figure", data=deletions())
    before = [path.read_bytes() for path in paths]
    PLOTS["histogram"]()
    draw, write = Figure.savefig, Path.write_bytes

    def failing_draw(self: Figure, *args: Any, **options: Any) -> None:
        if options["format"] == failing:
            raise OSError("no space left")
        draw(self, *args, **options)

    def failing_write(self: Path, content: bytes) -> int:
        if self.suffix == f".{failing}":
            raise OSError("no space left")
        return write(self, content)

    for owner, name, broken in ((Figure, "savefig", failing_draw), (Path, "write_bytes", failing_write)):
        if name == "savefig" and failing == "csv":
            continue
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(OSError, match="no space left"):
                save_figure(plt.gcf(), tmp_path / "figure", data=histograms())
        assert sorted(tmp_path.iterdir()) == sorted(paths)
        assert [path.read_bytes() for path in paths] == before
    save_figure(plt.gcf(), tmp_path / "figure", data=histograms())
    assert all(path.read_bytes() != old for path, old in zip(paths, before, strict=True))


# The plots: what all of them do


@pytest.mark.parametrize(
    ("plot", "frame", "value"),
    [
        (plot_path_histogram, rp.path_histogram(9), "fraction"),
        (plot_single_deletions, deletions(), "error_rate"),
        (plot_training_curves, curves(), "test_error_rate"),
    ],
)
def test_unusable_frames_are_refused_before_anything_is_drawn(
    plot: Callable[[Any], Axes], frame: pd.DataFrame, value: str
) -> None:
    there = ", ".join(name for name in frame.columns if name != value)
    with pytest.raises(ResnetPathsError, match=rf"^frame: got 'columns {there}'; .*{value}.*\. Missing: {value}\.$"):
        plot(frame.drop(columns=value))
    with pytest.raises(ResnetPathsError, match=r"^frame: got '0 rows'; allowed: at least one row"):
        plot(frame.iloc[:0])
    with pytest.raises(ResnetPathsError, match=rf"^frame: got .*a number in {value}"):
        plot(frame.assign(**{value: np.nan}))
    with pytest.raises(ResnetPathsError, match=r"^frame: got '1 repeated rows, first .*one row for each"):
        plot(pd.concat([frame, frame.iloc[[2]]]))
    with pytest.raises(
        ResnetPathsError, match=rf"^frame\['{value}'\]: got [\d.]+; .*\[0, 1\]. Divide percentages by 100"
    ):
        plot(frame.assign(**{value: 100 * frame[value] + 2}))
    with pytest.raises(ResnetPathsError, match=rf"^frame\['{value}'\]: got 'dtype .*a column of numbers"):
        plot(frame.assign(**{value: "1 %"}))
    with pytest.raises(ResnetPathsError, match=r"^frame: got 'dict'; allowed: a pandas DataFrame with columns"):
        plot({})
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", PLOTS)
def test_given_axes_are_used_and_returned(name: str) -> None:
    _, (left, right) = plt.subplots(1, 2)
    plt.sca(right)
    assert PLOTS[name]() is right
    assert not left.has_data()
    calls: dict[str, Callable[[Axes], Axes]] = {
        "histogram": lambda ax: plot_path_histogram(histograms(), ax),
        "deletions": lambda ax: plot_single_deletions(deletions(), ax),
        "graph": lambda ax: plot_unraveled_graph(rp.unraveled_graph(2), ax),
        "curves": lambda ax: plot_training_curves(curves(), ax),
    }
    assert calls[name](left) is left
    assert left.has_data()


@pytest.mark.parametrize("width", ["single", "double"])
@pytest.mark.parametrize("name", PLOTS)
def test_nothing_sticks_out_of_the_figure(name: str, width: Any) -> None:
    with paper_style(width):
        fig = plt.figure()
        ax = PLOTS[name]()
        fig.draw_without_rendering()
        box = fig.get_tightbbox()
        # One point of grace: the outermost tick label may overhang by part of a letter.
        assert min(box.x0, box.y0) > -1 / 72
        assert (box.x1, box.y1) <= tuple(fig.get_size_inches() + 1 / 72)
        legends = [legend.get_window_extent() for legend in ax.findobj(Legend)]
        for index, extent in enumerate(legends):
            assert not any(extent.overlaps(other) for other in legends[index + 1 :])
            assert not extent.overlaps(ax.get_window_extent())


@pytest.mark.parametrize(
    ("plot", "labels"),
    [
        ("histogram", ("path length (blocks)", "paths (%)")),
        ("deletions", ("deleted block (index from 0)", "test error (%)")),
        ("curves", ("epoch", "test error (%)")),
    ],
)
def test_axes_are_labelled_with_units(plot: str, labels: tuple[str, str]) -> None:
    ax = PLOTS[plot]()
    assert (ax.get_xlabel(), ax.get_ylabel()) == labels
    assert ax.get_ylim()[0] == 0


# plot_path_histogram


def test_histogram_bars_are_the_fractions() -> None:
    frame = rp.path_histogram(54)
    ax = plot_path_histogram(frame.sample(frac=1, random_state=0))
    assert [bar.get_x() + bar.get_width() / 2 for bar in ax.patches] == pytest.approx(range(55))
    assert [bar.get_height() for bar in ax.patches] == [100 * fraction for fraction in frame["fraction"]]
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(100)
    assert legend_texts(ax) == []


def test_histograms_of_several_networks_are_lines_named_in_the_legend() -> None:
    ax = plot_path_histogram(histograms())
    for n in (9, 27):
        frame = rp.path_histogram(n)
        assert (line(ax, f"{n} blocks") == np.column_stack([frame["path_length"], 100 * frame["fraction"]])).all()
    assert legend_texts(ax) == ["9 blocks", "27 blocks"]
    assert len({str(drawn.get_marker()) for drawn in ax.lines}) == 2


def test_joined_histograms_need_a_network_column() -> None:
    with pytest.raises(ResnetPathsError, match=r"first path_length 0.*Add a column network if these are several"):
        plot_path_histogram(pd.concat([rp.path_histogram(3), rp.path_histogram(4)]))


# plot_single_deletions


def test_deletions_are_the_rows_of_the_frame() -> None:
    frame = pd.concat([deletions(), deletions("preact-resnet-20", 9, seed=1)])
    ax = plot_single_deletions(frame.sample(frac=1, random_state=0).sort_values("network", ascending=False))
    bars, intact = ax.collections[0::2], ax.collections[1::2]
    for index, (name, rows) in enumerate(frame.groupby("network", sort=False)):
        assert (line(ax, name) == np.column_stack([rows["block_index"], 100 * rows["error_rate"]])).all()
        assert isinstance(bars[index], LineCollection)
        ends = np.array(bars[index].get_segments())
        assert (ends[:, 0, 0] == rows["block_index"]).all()
        assert (ends[:, 0, 1] == 100 * rows["error_rate_low"]).all()
        assert (ends[:, 1, 1] == 100 * rows["error_rate_high"]).all()
        ((left, right),) = intact[index].get_segments()
        assert left[1] == right[1] == 100 * rows["intact_error_rate"].iloc[0]
        (drawn,) = [found for found in ax.lines if found.get_label() == name]
        assert to_rgb(drawn.get_color()) == tuple(intact[index].get_edgecolor()[0][:3])
        assert drawn.get_linestyle() == "-"
        assert intact[index].get_linestyle()[0][1] is not None  # dashed
    assert legend_texts(ax) == ["preact-resnet-56", "preact-resnet-20", "intact"]
    left, right = ax.get_xlim()
    # Room for the dashed lines, none for an index that no block has.
    assert -1 < left < -0.5
    assert 26.5 < right < 27


def test_a_row_without_a_number_leaves_a_gap() -> None:
    frame = deletions()
    frame.loc[5, ["error_rate", "error_rate_low", "error_rate_high"]] = np.nan
    ax = plot_single_deletions(frame)
    drawn = line(ax, "preact-resnet-56")
    assert np.isnan(drawn[5, 1])
    assert np.isnan(drawn[:, 1]).sum() == 1


def test_published_results_stand_in_grey_behind() -> None:
    ax = plot_single_deletions(deletions(), published=published())
    label = "Veit et al. 2016, preact-resnet-20 (CIFAR-10)"
    assert line(ax, label).tolist() == [[0, 69.98], [1, 19.97], [2, 44.74]]
    (theirs,) = [found for found in ax.lines if found.get_label() == label]
    (ours,) = [found for found in ax.lines if found.get_label() == "preact-resnet-56"]
    assert theirs.get_zorder() < ours.get_zorder()
    assert len(set(to_rgb(theirs.get_color()))) == 1
    assert label in legend_texts(ax)
    dashed = [drawn.get_segments()[0] for drawn in ax.collections if len(drawn.get_segments()) == 1]
    heights = {float(segment[0, 1]) for segment in dashed}
    assert heights == {8.495, 100 * deletions()["intact_error_rate"].iloc[0]}


def test_published_results_are_checked_too() -> None:
    with pytest.raises(ResnetPathsError, match=r"^published: got .*Missing: dataset, intact_error_percent\.$"):
        plot_single_deletions(deletions(), published=published().drop(columns=["dataset", "intact_error_percent"]))
    assert plt.get_fignums() == []


def test_stage_starts_are_marked_and_named_once() -> None:
    ax = plot_single_deletions(deletions(), stage_starts=[18, 9])
    assert [int(x) for x in ax.lines[-1].get_xdata()] == [9, 18]
    assert [segment[0][0] for segment in ax.collections[-1].get_segments()] == [9, 18]
    assert texts(ax) == ["stage starts"]
    assert texts(plot_single_deletions(deletions(), plt.figure().gca())) == []


@pytest.mark.parametrize("chance", [0.5, 0.9, 0.999])
def test_chance_is_a_dotted_line(chance: float) -> None:
    ax = plot_single_deletions(deletions(), chance=chance)
    assert ax.lines[-1].get_linestyle() == ":"
    assert set(ax.lines[-1].get_ydata()) == {100 * chance}
    assert texts(ax) == ["chance"]
    ax.figure.draw_without_rendering()
    label = ax.texts[0].get_window_extent()
    assert label.y1 <= ax.get_window_extent().y1 + 1
    assert label.y0 >= ax.get_window_extent().y0


def test_no_line_leads_across_a_block_that_was_not_deleted() -> None:
    frame = deletions()
    network = frame["network"].iloc[0]
    frame = frame[(frame["network"] == network) & ~frame["block_index"].isin([2, 5])]
    curve = next(line for line in plot_single_deletions(frame).lines if line.get_label() == network)
    missing = np.isnan(np.asarray(curve.get_ydata(), dtype=float))
    assert np.asarray(curve.get_xdata())[missing].tolist() == [2, 5]
    assert np.asarray(curve.get_ydata())[~missing] == pytest.approx(100 * frame["error_rate"].to_numpy())


@pytest.mark.parametrize("chance", [-0.1, 90, float("nan")])
def test_chance_must_be_a_rate(chance: float) -> None:
    with pytest.raises(ResnetPathsError, match=r"^chance: got .*an error rate in \[0, 1\]"):
        plot_single_deletions(deletions(), chance=chance)


# plot_unraveled_graph


def boxes(ax: Axes) -> list[str]:
    return sorted(text.get_text() for text in ax.texts if text.get_bbox_patch() is not None)


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


# plot_training_curves


@pytest.mark.parametrize(
    ("value", "label", "factor"),
    [
        ("train_loss", "training loss (nats)", 1),
        ("train_error_rate", "training error (%)", 100),
        ("test_loss", "test loss (nats)", 1),
        ("test_error_rate", "test error (%)", 100),
    ],
)
def test_curves_are_means_in_a_band_over_seeds(value: str, label: str, factor: int) -> None:
    frame = curves()
    ax = plot_training_curves(frame, value=value)
    assert ax.get_ylabel() == label
    assert legend_texts(ax) == ["residual", "plain"]
    drawn = [found for found in ax.lines if len(found.get_xdata())]
    for index, (_, rows) in enumerate(frame.groupby("network", sort=False)):
        by_epoch = factor * rows.groupby("epoch")[value].agg(["mean", "min", "max"])
        assert drawn[index].get_xdata() == pytest.approx([1, 2, 3, 4, 5])
        assert drawn[index].get_ydata() == pytest.approx(by_epoch["mean"])
        band = ax.collections[index].get_paths()[0].vertices
        for epoch, row in by_epoch.iterrows():
            edge = band[band[:, 0] == epoch, 1]
            assert (edge.min(), edge.max()) == pytest.approx((row["min"], row["max"]))
    assert drawn[0].get_color() != drawn[1].get_color()
    assert drawn[0].is_dashed() != drawn[1].is_dashed()


def test_curves_tolerate_rows_without_a_number() -> None:
    frame = curves()
    frame.loc[frame["epoch"] == 3, "test_loss"] = np.nan
    ax = plot_training_curves(frame, value="test_loss")
    assert list(ax.lines[0].get_xdata()) == [1, 2, 4, 5]


def test_other_values_are_refused() -> None:
    with pytest.raises(ResnetPathsError, match=r"^value: got 'accuracy'; allowed: one of 'train_loss', 'train_err"):
        plot_training_curves(curves(), value="accuracy")

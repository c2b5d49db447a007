"""The style of a paper, and saved files as a publisher asks for them."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures import (
    paper_style,
    save_figure,
    weights_hash,
)
from resnet_paths.figures import style as paper
from tests.figures.frames import PLOTS, deletions, histograms

KINDS = ("pdf", "svg", "png", "csv")


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield


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
    for attempt in ("first", "again", "redrawn"):
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


def test_counts_of_any_size_are_saved(tmp_path: Path) -> None:
    frame = rp.path_histogram(15_000)
    *_, path = save_figure(plt.figure(), tmp_path / "figure", data=frame.iloc[7_500:7_501])
    assert len(path.read_text().splitlines()[1]) > 4_500


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

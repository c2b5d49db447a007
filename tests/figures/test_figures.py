"""What all plot functions do; histograms and training curves have the numbers of their frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.legend import Legend

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures import (
    paper_style,
    plot_path_histogram,
    plot_single_deletions,
    plot_training_curves,
    plot_unraveled_graph,
)
from tests.figures.frames import PLOTS, curves, deletions, histograms, legend_texts, line


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield


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
    with pytest.raises(ResnetPathsError, match=r"first path_length = 0.*Add a column network if these are several"):
        plot_path_histogram(pd.concat([rp.path_histogram(3), rp.path_histogram(4)]))


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

"""Single deletions and scalings: lines, intervals, intact errors, published results."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures import (
    paper_style,
    plot_reorderings,
    plot_scalings,
    plot_score_correlations,
    plot_single_deletions,
)
from tests.figures.frames import deletions, error_bars, legend_texts, line, published, texts


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield


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


def test_another_measure_is_drawn_in_its_own_unit() -> None:
    columns = ["error_rate", "error_rate_low", "error_rate_high", "intact_error_rate"]
    frame = deletions().rename(columns={name: name.replace("error_rate", "cross_entropy") for name in columns})
    frame[[name.replace("error_rate", "cross_entropy") for name in columns]] *= 30
    ax = plot_single_deletions(frame, value="cross_entropy")
    rows = frame[frame["network"] == "preact-resnet-56"].sort_values("block_index")
    np.testing.assert_allclose(line(ax, "preact-resnet-56")[:, 1], rows["cross_entropy"])
    assert ax.get_ylabel() == "cross-entropy (nats)"
    assert ax.get_ylim()[1] > rows["cross_entropy"].max()
    with pytest.raises(ResnetPathsError, match=r"^value: got 'cross_entropy'; allowed: 'error_rate' with published"):
        plot_single_deletions(frame, chance=0.9, value="cross_entropy")


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


def test_scalings_are_drawn_in_percent_with_intervals() -> None:
    frame = pd.DataFrame({
        "block": ["a", "a", "b"],
        "factor": [2.0, 0.5, 1.0],
        "error_rate": [0.2, 0.1, 0.3],
        "error_rate_low": [0.15, 0.08, 0.2],
        "error_rate_high": [0.3, 0.12, 0.4],
        "intact_error_rate": 0.05,
    })
    ax = plot_scalings(frame)
    points, bars = error_bars(ax, "a")
    np.testing.assert_allclose(points, [[0.5, 10], [2, 20]])
    np.testing.assert_allclose(bars, [[8, 12], [15, 30]])
    assert sorted(legend_texts(ax)) == ["a", "b", "intact"]
    assert [line.get_ydata()[0] for line in ax.lines if line.get_label() == "intact"] == [5]
    with pytest.raises(ResnetPathsError, match="a rate in"):
        plot_scalings(frame.assign(error_rate=20))
    with pytest.raises(ResnetPathsError, match="Missing: factor"):
        plot_scalings(frame.drop(columns="factor"))


def test_labels_of_a_correlation_do_not_overlap() -> None:
    ax = plot_reorderings(pd.DataFrame({"kendall_tau": [1.0, 0.9, 0.8], "error_rate": 0.1}))
    ax.figure.draw_without_rendering()
    low, high = sorted(ax.get_xlim())
    extents = [
        label.get_window_extent()
        for tick, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert len(extents) > 3
    gaps = [abs(one.x0 + one.x1 - two.x0 - two.x1) / 2 - one.width for one, two in itertools.pairwise(extents)]
    assert min(gaps) > 5  # pixels


def test_a_measure_has_its_unit() -> None:
    frame = deletions().assign(margin=2.0, margin_low=1.0, margin_high=3.0, intact_margin=4.0)
    assert plot_single_deletions(frame, value="margin").get_ylabel() == "margin (logits)"


def correlations() -> pd.DataFrame:
    rows = [
        (network, score, effect, r, r - 0.2, r + 0.1)
        for network, r in (("a", 0.5), ("b", -0.25))
        for score in ("block_influence", "first_order_margin_increase")
        for effect in ("cross_entropy", "error_rate_increase")
    ]
    return pd.DataFrame(rows, columns=["network", "score", "effect", "spearman", "spearman_low", "spearman_high"])


def test_correlations_are_drawn_by_network_and_score() -> None:
    frame = correlations()
    frame.loc[frame.effect == "error_rate_increase", "spearman"] += 0.05
    ax = plot_score_correlations(frame)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert legend_texts(ax) == ["block influence (1 - cosine)", "first-order increase of the margin (logits)"]
    for container, offset in zip(ax.containers, (-0.175, 0.175), strict=True):
        np.testing.assert_allclose(container[0].get_xydata(), [[0.5, offset], [-0.25, 1 + offset]])
        ends = np.array(container[2][0].get_segments())[:, :, 0]
        np.testing.assert_allclose(ends, [[0.3, 0.6], [-0.45, -0.15]])
    other = plot_score_correlations(frame[frame.network == "a"], plt.figure().gca(), "error_rate_increase")
    assert other.containers[0][0].get_xdata().tolist() == [0.55]


def test_correlations_that_cannot_be_drawn() -> None:
    frame = correlations()
    with pytest.raises(ResnetPathsError, match=r"^effect: got 'margin'; allowed: one of 'error_rate_increase'"):
        plot_score_correlations(frame, effect="margin")
    with pytest.raises(ResnetPathsError, match=r"^effect: got 'cross_entropy'; allowed: one of 'error_rate_increase'"):
        plot_score_correlations(frame[frame.effect != "cross_entropy"])
    with pytest.raises(ResnetPathsError, match=r"repeated rows.*Add a column network"):
        plot_score_correlations(frame.drop(columns="network"))

"""Figures of predictions show the numbers of their frames."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import resnet_paths as rp

PREDICTION = pd.DataFrame({
    "path_length": [0, 1, 2],
    "share": [0.5, 0.7, -0.2],
    "share_low": [0.4, 0.6, -0.3],
    "share_high": [0.6, 0.9, -0.1],
})
GRADIENT = pd.DataFrame({"path_length": [0, 1, 2], "gradient_share": [0.1, 0.3, 0.6], "gradient_share_se": 0.01})


def test_shares_and_intervals():
    fig, ax = plt.subplots()
    assert rp.figures.plot_prediction_by_path_length(PREDICTION, ax, GRADIENT) is ax
    _, below = fig.axes
    for axes, shares in ((ax, PREDICTION["share"]), (below, GRADIENT["gradient_share"])):
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], 100 * shares)
    (segments,) = [collection.get_segments() for collection in ax.collections]
    np.testing.assert_allclose([segment[:, 1] for segment in segments], [[40, 60], [60, 90], [-30, -10]])
    (segments,) = [collection.get_segments() for collection in below.collections]
    np.testing.assert_allclose([np.diff(segment[:, 1])[0] for segment in segments], 2 * 1.96)
    plt.close(fig)


def test_contributions_are_in_the_unit_of_the_output():
    frame = pd.DataFrame({
        "path_length": [0, 1],
        "contribution": [-30.0, 31.0],
        "contribution_se": [1.0, 2.0],
        "mean_absolute_contribution": [35.0, 33.0],
    })
    frame.attrs["output"] = "log_probability"
    fig, axes = plt.subplots(1, 2)
    rp.figures.plot_prediction_by_path_length(frame, axes[0], value="contribution")
    assert [bar.get_height() for bar in axes[0].patches] == [-30, 31]
    (segments,) = [collection.get_segments() for collection in axes[0].collections]
    np.testing.assert_allclose([np.diff(segment[:, 1])[0] for segment in segments], [2 * 1.96, 4 * 1.96])
    rp.figures.plot_prediction_by_path_length(frame, axes[1], value="mean_absolute_contribution")
    assert [bar.get_height() for bar in axes[1].patches] == [35, 33]
    assert not axes[1].collections  # no interval
    assert [ax.get_ylabel() for ax in axes] == ["contribution (nats)", "mean absolute\ncontribution (nats)"]
    with pytest.raises(rp.ResnetPathsError, match=r"value: got 'gradient'; allowed: one of 'share', 'contribution'"):
        rp.figures.plot_prediction_by_path_length(frame, axes[0], value="gradient")
    plt.close(fig)


def test_frames_by_source_are_refused():
    twice = pd.concat([PREDICTION, PREDICTION])
    with pytest.raises(rp.ResnetPathsError, match="path_length"):
        rp.figures.plot_prediction_by_path_length(twice)


def mesh_of(ax):
    """The values of a heat map, with NaN where there is no cell, and its limits."""
    (mesh,) = ax.collections
    values = np.ma.filled(np.ma.masked_invalid(mesh.get_array()).astype(float), np.nan)
    return values, mesh.get_clim()


def test_sources_and_lengths():
    frame = pd.DataFrame({
        "source": ["stem", "stem", "block0", "block0", "head"],
        "block_index": pd.array([None, None, 0, 0, None], dtype="Int64"),
        "path_length": [0, 1, 0, 1, 0],
        "share": [0.5, -0.8, 0.1, 0.9, 0.3],
    })
    fig, ax = plt.subplots()
    values, limits = mesh_of(rp.figures.plot_prediction_by_source(frame, ax))
    np.testing.assert_allclose(values, [[50, -80], [10, 90], [30, np.nan]])
    assert limits == (-90, 90)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "block0", "head"]
    with pytest.raises(rp.ResnetPathsError, match="repeated rows"):  # parts of blocks apart
        rp.figures.plot_prediction_by_source(pd.concat([frame, frame]), ax)
    plt.close(fig)


def test_many_sources_are_numbered():
    names = ["stem", *(f"layer{i}" for i in range(25)), "head"]
    numbers = pd.array([None, *range(25), None], dtype="Int64")
    frame = pd.DataFrame({"source": names, "block_index": numbers, "path_length": 0, "share": 1 / 27})
    fig, ax = plt.subplots()
    rp.figures.plot_prediction_by_source(frame, ax)
    ticks = dict(zip(ax.get_yticks(), (label.get_text() for label in ax.get_yticklabels()), strict=True))
    assert ticks == {0: "stem", 11: "10", 21: "20", 26: "head"}
    plt.close(fig)


LENS = pd.DataFrame({
    "depth": [0, 0, 1],
    "path_length": [0, 1, 0],
    "kl_divergence": [2.0, 1.0, 0.5],
    "kl_divergence_se": 0.1,
    "agreement": [0.1, 0.5, 0.8],
    "agreement_low": [0.05, 0.4, 0.7],
    "agreement_high": [0.2, 0.7, 0.85],
})


def test_lens_map_and_line():
    fig, ax = plt.subplots()
    values, _ = mesh_of(rp.figures.plot_lens(LENS, ax))
    np.testing.assert_allclose(values, [[2, 0.5], [1, np.nan]])
    ax.clear()
    rp.figures.plot_lens(LENS[LENS.path_length == 0], ax, "agreement")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 10], [1, 80]])
    np.testing.assert_allclose([s[:, 1] for s in ax.collections[0].get_segments()], [[5, 20], [70, 85]])
    ax.clear()
    rp.figures.plot_lens(LENS[LENS.path_length == 0], ax)
    np.testing.assert_allclose([np.diff(s[:, 1])[0] for s in ax.collections[0].get_segments()], 0.392)
    with pytest.raises(rp.ResnetPathsError, match="value"):
        rp.figures.plot_lens(LENS, ax, "entropy")
    plt.close(fig)


ITERATIVE = pd.DataFrame({
    "block_index": [0, 1, 2],
    "stage": [0, 0, 1],
    "error_rate": [0.9, 0.5, 0.1],
    "error_rate_low": [0.8, 0.4, 0.05],
    "error_rate_high": [0.95, 0.6, 0.2],
    "gradient_cosine": [-0.1, np.nan, -0.3],
    "gradient_cosine_se": [0.1, np.nan, 0.1],
})


def test_iterative_inference_shows_values_and_intervals():
    fig, ax = plt.subplots()
    rp.figures.plot_iterative_inference(ITERATIVE, ax, "error_rate")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 90], [1, 50], [2, 10]])
    np.testing.assert_allclose([s[:, 1] for s in ax.collections[0].get_segments()], [[80, 95], [40, 60], [5, 20]])
    assert [text.get_text() for text in ax.texts] == ["stage starts"]
    ax.clear()
    networks = pd.concat([ITERATIVE.assign(network="a"), ITERATIVE.assign(network="b")])
    rp.figures.plot_iterative_inference(networks, ax, "gradient_cosine")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [-0.1, np.nan, -0.3])
    np.testing.assert_allclose(np.diff(ax.collections[0].get_segments()[0][:, 1]), 0.392)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    for frame, value, message in [
        (ITERATIVE, "entropy", "value"),
        (ITERATIVE, "cross_entropy", "columns"),
        (networks.drop(columns="network"), "error_rate", "repeated"),
    ]:
        with pytest.raises(rp.ResnetPathsError, match=message):
            rp.figures.plot_iterative_inference(frame, ax, value)
    plt.close(fig)


def test_effect_matrix_is_triangular_and_begins_at_0():
    frame = pd.DataFrame({
        "deleted_index": pd.array([0, 0, 1], dtype="Int64"),
        "block_index": [1, 2, 2],
        "relative_change": [0.5, 0.2, 1.5],
        "direct_effect_change": [-3.0, 1.0, 2.0],
    })
    fig, axes = plt.subplots(1, 2)
    values, limits = mesh_of(rp.figures.plot_effect_matrix(frame, axes[0]))
    np.testing.assert_allclose(values, [[np.nan, 50, 20], [np.nan, np.nan, 150], [np.nan] * 3])
    assert limits == (0, 150)
    assert axes[0].collections[0].cmap.name == "viridis"
    frame.attrs["output"] = "margin"
    values, limits = mesh_of(rp.figures.plot_effect_matrix(frame, axes[1], "direct_effect_change"))
    assert (values[0, 1], limits) == (-3, (-3, 3))
    assert axes[1].collections[0].cmap.name == "RdBu_r"
    assert fig.axes[-1].get_ylabel() == "change of the direct effect (logits)"
    several = frame.assign(deleted_index=pd.array([None] * 3, dtype="Int64"))
    with pytest.raises(rp.ResnetPathsError, match="deleted_index"):
        rp.figures.plot_effect_matrix(several, axes[0])
    plt.close(fig)


def test_effect_matrices_may_share_their_colours():
    frame = pd.DataFrame({
        "deleted_index": [0],
        "block_index": [1],
        "relative_change": 0.5,
        "direct_effect_change": 2.0,
    })
    fig, axes = plt.subplots(1, 3)
    for ax, value, vmax, expected, beyond in (
        (axes[0], "relative_change", 1.75, (0, 175), "neither"),
        (axes[1], "relative_change", 0.25, (0, 25), "max"),
        (axes[2], "direct_effect_change", 3, (-3, 3), "neither"),
    ):
        _, limits = mesh_of(rp.figures.plot_effect_matrix(frame, ax, value, vmax=vmax))
        assert limits == expected
        assert ax.collections[0].colorbar.extend == beyond
    with pytest.raises(rp.ResnetPathsError, match="vmax: got 0; allowed: a finite number above 0, or None"):
        rp.figures.plot_effect_matrix(frame, axes[0], vmax=0)
    plt.close(fig)


def test_waterfall_ends_at_the_output():
    frame = pd.DataFrame({"source": ["stem", "a", "b", "c", "constants"], "direct_effect": [1.0, 0.1, -2.0, 4.0, -0.2]})
    frame.attrs["output"] = "margin"
    fig, ax = plt.subplots()
    image = np.arange(12.0).reshape(1, 3, 4)
    assert rp.figures.plot_waterfall(frame, ax, image=image, num_bars=3) is ax
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    np.testing.assert_allclose(bars, [(0, 1), (1, -2), (-1, 4), (3, -0.1), (0, 2.9)], atol=1e-12)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["stem", "b", "c", "2 others", "margin"]
    assert ax.get_xlabel() == "contribution to the margin (logits)"
    shown = fig.axes[1].images[0].get_array()
    np.testing.assert_allclose(np.squeeze(shown), image[0] / 11)
    assert fig.axes[1].get_position().x1 <= ax.get_position().x0
    plt.close(fig)


def test_waterfall_of_lengths_and_of_sources():
    by_length = pd.DataFrame({"path_length": [0, 1], "contribution": [0.5, 0.25]})
    by_source = pd.DataFrame({
        "source": ["stem", "stem", "head"],
        "path_length": [0, 1, 0],
        "contribution": [1.0, 2, 3],
    })
    fig, axes = plt.subplots(1, 2)
    for ax, frame, widths in zip(axes, (by_length, by_source), ([0.5, 0.25, 0.75], [3, 3, 6]), strict=True):
        rp.figures.plot_waterfall(frame, ax)
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], widths)
    with pytest.raises(rp.ResnetPathsError, match="image"):
        rp.figures.plot_waterfall(by_length, axes[0], image=np.zeros((5, 5, 5)))
    with pytest.raises(rp.ResnetPathsError, match="num_bars"):
        rp.figures.plot_waterfall(by_length, axes[0], num_bars=0)
    plt.close(fig)


def test_terms_of_a_deletion_are_stacked_by_sign():
    frame = pd.DataFrame({
        "deleted_index": [0, 1],
        "total_effect": [-1.0, 0.5],
        "direct_effect": [2.0, -1.0],
        "later_change": [0.5, -1.5],
        "head_change": [0.5, 1.0],
        "skip_change": 0.0,
    })
    fig, ax = plt.subplots()
    rp.figures.plot_deletion_account(frame, ax)
    assert ax.get_ylabel() == "change of the output"
    for block, row in frame.iterrows():
        bars = [bar for bar in ax.patches if round(bar.get_x() + bar.get_width() / 2) == block and bar.get_height()]
        heights = [bar.get_height() for bar in bars]
        assert sum(heights) == pytest.approx(row["total_effect"])
        assert sorted(heights) == sorted([-row["direct_effect"], row["later_change"], row["head_change"]])
        for sign in (1, -1):
            ends = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in bars if bar.get_height() * sign > 0)
            assert sum(abs(stop - start) for start, stop in ends) == pytest.approx(
                max(abs(e) for end in ends for e in end)
            )
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, -1], [1, 0.5]])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert set(labels) == {"direct effect, removed", "later blocks", "head", "total effect"}  # no term that is always 0
    frame.attrs["output"] = "margin"
    assert rp.figures.plot_deletion_account(frame, ax).get_ylabel() == "change of the margin (logits)"
    plt.close(fig)

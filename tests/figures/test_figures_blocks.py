"""Figures along the blocks: the numbers drawn are the numbers of the frame."""

from __future__ import annotations

import math

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import resnet_paths as rp
from resnet_paths import figures
from resnet_paths.gradients import scalar_gradients
from tests.figures.frames import error_bars, legend_texts, texts


@pytest.fixture(autouse=True)
def _style():
    with figures.paper_style("single"):
        yield


def norms(**columns):
    frame = pd.DataFrame({"block_index": range(4), "stage": [0, 0, 1, 1]})
    names = ("skip_norm", "branch_norm", "sum_norm", "cosine", "kept_signal_share")
    for number, name in enumerate(names, start=1):
        frame[name], frame[f"{name}_se"] = number + 0.1 * frame.block_index, 0.01 * number
    return frame.assign(**columns)


def test_norms_are_drawn_as_they_are():
    ax = figures.plot_block_norms(norms(), highlight=2)
    points, bars = error_bars(ax, "F(x)")
    np.testing.assert_allclose(points, [[0, 2.0], [1, 2.1], [2, 2.2], [3, 2.3]])
    np.testing.assert_allclose(bars[1], [2.08, 2.12])
    assert legend_texts(ax) == ["x, along the skip", "F(x)", "F(x) + x"]
    assert "stage starts" in texts(ax)
    assert (ax.get_yscale(), ax.get_xlabel()) == ("log", "block (index from 0)")
    (band,) = [patch for patch in ax.patches if patch.get_width() == 1]
    assert band.get_x() == 1.5


def test_a_plain_net_has_sums_alone():
    ax = figures.plot_block_norms(norms(skip_norm=math.nan, skip_norm_se=math.nan, stage=0))
    assert np.isnan(error_bars(ax, "x, along the skip")[0][:, 1]).all()
    assert error_bars(ax, "F(x) + x")[0][0, 1] == 3
    assert "stage starts" not in texts(ax)


def test_directions_are_drawn_as_they_are():
    ax = figures.plot_block_directions(norms(kept_signal_share=[0.3, 0.1, -0.2, math.nan]))
    assert error_bars(ax, "cosine of x and F(x)")[0][1].tolist() == [1, 4.1]
    assert error_bars(ax, "share of the signal kept by the skips")[0][2].tolist() == [2, -0.2]
    assert ax.get_yscale() == "linear"


def test_gradients_by_depth_are_drawn_as_they_are():
    one = pd.DataFrame({"depth": [0, 1, 2], "gradient_norm": [1.0, 10, 100], "gradient_norm_se": [0.1, 1, 10]})
    ax = figures.plot_gradient_by_depth(
        pd.concat([one.assign(network="a"), (2 * one).assign(network="b", depth=one.depth)])
    )
    points, bars = error_bars(ax, "b")
    assert points.tolist() == [[0, 2], [1, 20], [2, 200]]
    np.testing.assert_allclose(bars[2], [180, 220])
    assert legend_texts(ax) == ["a", "b"]
    plt.clf()
    alone = figures.plot_gradient_by_depth(one.assign(network="b"), networks=["a", "b"])
    assert alone.lines[0].get_color() == "C1"
    assert alone.lines[0].get_marker() == "s"
    with pytest.raises(rp.ResnetPathsError, match=r"networks: got .*names that include 'b'"):
        figures.plot_gradient_by_depth(one.assign(network="b"), networks=["a"])
    plt.clf()
    assert not legend_texts(figures.plot_gradient_by_depth(one))
    with pytest.raises(rp.ResnetPathsError, match="repeated rows"):
        figures.plot_gradient_by_depth(pd.concat([one, one]))


def test_products_are_drawn_by_size_and_zeros_left_out():
    frame = scalar_gradients([-1.0, 2.0, 1.0], "relu", start=-1.0)
    ax = figures.plot_scalar_gradients(frame)
    for network, label in (("plain", "product of F', plain"), ("residual", "product of 1 + F', residual")):
        (line,) = [found for found in ax.lines if found.get_label() == label]
        sizes = frame[frame.network == network].gradient.abs().to_numpy()
        np.testing.assert_allclose(line.get_ydata(), np.where(sizes > 0, sizes, np.nan))
    plt.clf()
    ax = figures.plot_scalar_gradients(scalar_gradients([1.0], "relu", start=-1.0))
    assert np.isnan(ax.lines[0].get_ydata()[1])

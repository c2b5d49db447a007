"""Figures that set networks, or moments of training, side by side: the numbers drawn are those of the frame."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.figures import paper_style, plot_path_shares, plot_windows


@pytest.fixture(autouse=True)
def _style():
    with paper_style("double", aspect=0.4):
        yield


def splits() -> pd.DataFrame:
    frames = []
    for epoch, centre in ((0, 5.0), (4, 3.0), (1, 4.0)):
        share = np.exp(-((np.arange(10) - centre) ** 2)) * (1 + epoch)
        share[9] = -0.01
        frame = pd.DataFrame({"path_length": range(10), "gradient_share": share, "gradient_share_se": 0.1 * abs(share)})
        frames.append(frame.assign(epoch=epoch, num_paths=rp.path_histogram(9).num_paths))
    return pd.concat(frames)


def windows() -> pd.DataFrame:
    rows = [
        {"epoch": epoch, **vars(rp.effective_window(rows, "gradient_share")), "mean_path_length": 4.5 - 0.5 * epoch}
        for epoch, rows in splits().groupby("epoch")
    ]
    return pd.DataFrame(rows)


def test_shares_of_each_moment_are_lines_in_percent_of_their_own_sum():
    frame = splits()
    ax = plot_path_shares(frame, "epoch", ordered=True)
    for (epoch, rows), bars in zip(frame.groupby("epoch", sort=False), ax.containers, strict=True):
        assert bars.get_label() == str(epoch)
        x, y = bars.lines[0].get_xydata().T
        np.testing.assert_array_equal(x, rows.path_length)
        np.testing.assert_allclose(y, 100 * rows.gradient_share / rows.gradient_share.sum())
        low, high = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()]).T
        np.testing.assert_allclose(high - low, 20 * abs(rows.gradient_share) / rows.gradient_share.sum(), atol=1e-9)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "4", "1"]
    assert ax.get_legend().get_title().get_text() == "epoch"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("path length (blocks)", "gradient share (%)")


def test_shares_of_networks_need_no_title_and_no_errors():
    frame = splits().rename(columns={"epoch": "network"}).drop(columns="gradient_share_se")
    ax = plot_path_shares(frame, "network")
    assert ax.get_legend().get_title().get_text() in {"", "None"}
    assert all(bars.lines[2] == () for bars in ax.containers)


def test_windows_are_bars_over_the_lengths_that_they_hold():
    frame = windows()
    ax = plot_windows(frame, "epoch", num_blocks=9)
    for bar, row in zip(ax.patches, frame.itertuples(), strict=True):
        assert (bar.get_y(), bar.get_y() + bar.get_height()) == (row.shortest - 0.5, row.longest + 0.5)
    dots, line = ax.lines
    assert dots.get_ydata().tolist() == frame.mean_path_length.tolist()
    assert set(line.get_ydata()) == {4.5}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "4"]
    plt.figure()
    assert plot_windows(frame.drop(columns="mean_path_length"), "epoch").lines[0].get_label() == "peak"


def test_unusable_frames_are_refused():
    with pytest.raises(ResnetPathsError, match=r"^frame: got 'columns .*Missing: network\.$"):
        plot_path_shares(splits(), "network")
    with pytest.raises(ResnetPathsError, match="one row for each epoch, path_length"):
        plot_path_shares(pd.concat([splits(), splits()]), "epoch")
    with pytest.raises(ResnetPathsError, match="a column with a positive sum at epoch 0"):
        plot_path_shares(splits().assign(gradient_share=-1.0), "epoch")
    with pytest.raises(ResnetPathsError, match=r"Missing: shortest"):
        plot_windows(windows().drop(columns="shortest"), "epoch")
    with pytest.raises(ResnetPathsError, match="one row for each epoch"):
        plot_windows(pd.concat([windows(), windows()]), "epoch")
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    "plot",
    [
        lambda ax: plot_path_shares(splits(), "epoch", ax=ax),
        lambda ax: plot_windows(windows(), "epoch", ax=ax, num_blocks=9),
    ],
)
def test_nothing_sticks_out(plot):
    fig, (left, _) = plt.subplots(1, 2)
    assert plot(left) is left
    fig.draw_without_rendering()
    box = fig.get_tightbbox()
    assert min(box.x0, box.y0) > -1 / 72
    assert (box.x1, box.y1) <= tuple(fig.get_size_inches() + 1 / 72)

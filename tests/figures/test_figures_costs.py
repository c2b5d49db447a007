"""Figures of costs: the bars and lines are the numbers of the frame."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import resnet_paths as rp
from resnet_paths.figures import paper_style, plot_cost_by_depth, plot_training_memory

MEMORY = pd.DataFrame({
    "network": ["plain", "dense"],
    "parameters_megabytes": [1.0, 2.0],
    "saved_megabytes": [36.0, 329.0],
    "peak_megabytes": [39.0, 335.0],
})
DEPTHS = pd.DataFrame({
    "kind": ["identity"] * 3 + ["dense"] * 3,
    "num_blocks": [1, 2, 4] * 2,
    "peak_megabytes": [1.0, 2, 4, 1, 4, 16],
})


@pytest.fixture(autouse=True)
def _style():
    with paper_style("double", aspect=0.3):
        yield


def test_bars_end_at_the_peak_which_stands_beside_them():
    ax = plot_training_memory(MEMORY)
    ends = {round(bar.get_y() + bar.get_height() / 2): bar.get_x() + bar.get_width() for bar in ax.patches}
    assert ends == {0: 39.0, 1: 335.0}
    widths = np.array([bar.get_width() for bar in ax.patches]).reshape(3, 2)
    np.testing.assert_allclose(widths, [[1, 2], [36, 329], [2, 4]])
    assert [text.get_text() for text in ax.texts] == ["39", "335"]
    assert ax.get_xlabel() == "memory of a training step (MB)"
    assert ax.yaxis_inverted()


def test_lines_are_the_rows_of_each_kind():
    ax = plt.figure().add_subplot()
    assert plot_cost_by_depth(DEPTHS, "peak_megabytes", ax) is ax
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn == {"identity": [[1, 1], [2, 2], [4, 4]], "dense": [[1, 1], [2, 4], [4, 16]]}
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ("log", "log", "peak memory (MB)")
    ax.figure.draw_without_rendering()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4"]
    assert len({line.get_marker() for line in ax.lines}) == 2  # told apart in grey


def test_unusable_input_is_refused():
    with pytest.raises(rp.ResnetPathsError, match=r"^value: got 'seconds'; allowed: one of 'num_parameters'"):
        plot_cost_by_depth(DEPTHS, "seconds")
    with pytest.raises(rp.ResnetPathsError, match="Missing: num_parameters"):
        plot_cost_by_depth(DEPTHS, "num_parameters")
    with pytest.raises(rp.ResnetPathsError, match="repeated rows"):
        plot_training_memory(pd.concat([MEMORY, MEMORY]))

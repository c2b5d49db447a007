"""Figures of branch Jacobians show the numbers of their frames."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import resnet_paths as rp

VALUES = pd.DataFrame({
    "block_index": [0, 0, 1, 1],
    "stage": [0, 0, 1, 1],
    "order": [0, 1, 0, 1],
    "singular_value": [4.0, 2.0, 3.0, 1.0],
    "singular_value_se": 0.1,
})
PAIRS = pd.DataFrame({
    "block_index": [0, 0, 1],
    "other_index": [0, 1, 1],
    "left_right": [0.5, 0.25, np.nan],
    "right_right": [1.0, 0.75, 1.0],
})


def test_singular_values_by_order():
    fig, ax = plt.subplots()
    assert rp.figures.plot_singular_values(VALUES, ax) is ax
    lines = [line.get_xydata().tolist() for line in ax.lines[:2]]
    assert lines == [[[0, 4], [1, 3]], [[0, 2], [1, 1]]]
    np.testing.assert_allclose(np.diff(ax.collections[0].get_segments()[0][:, 1]), 0.392)
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.texts] == ["stage starts"]
    with pytest.raises(rp.ResnetPathsError, match="repeated"):
        rp.figures.plot_singular_values(pd.concat([VALUES, VALUES]), ax)
    plt.close(fig)


def test_alignment_of_pairs():
    fig, ax = plt.subplots()
    rp.figures.plot_residual_alignment(PAIRS, ax)
    (mesh,) = ax.collections
    np.testing.assert_allclose(np.ma.filled(mesh.get_array(), np.nan), [[0.5, 0.25], [np.nan, np.nan]])
    ax.clear()
    rp.figures.plot_residual_alignment(PAIRS, ax, "right_right")
    np.testing.assert_allclose(np.ma.filled(ax.collections[0].get_array(), np.nan), [[1, 0.75], [np.nan, 1]])
    with pytest.raises(rp.ResnetPathsError, match="value"):
        rp.figures.plot_residual_alignment(PAIRS, ax, "cosine")
    plt.close(fig)

"""The figure of the prediction by path length shows the numbers of its frames."""

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


def test_frames_by_source_are_refused():
    twice = pd.concat([PREDICTION, PREDICTION])
    with pytest.raises(rp.ResnetPathsError, match="path_length"):
        rp.figures.plot_prediction_by_path_length(twice)

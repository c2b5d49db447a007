"""Figures of gradients by path length: what is measured is inside the axes."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import resnet_paths as rp
from resnet_paths.figures import paper_style, plot_block_independence, plot_coherence, plot_effective_window
from resnet_paths.gradients import BlockIndependence


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield
    plt.close("all")


@pytest.mark.parametrize(("highest", "shown"), [(1.0, False), (3.0, True), (8.0, True)])
def test_the_largest_possible_coherence_is_shown_unless_it_is_far_above(highest: float, *, shown: bool) -> None:
    frame = rp.path_histogram(10).assign(coherence=1.0, coherence_se=0.1)
    frame.loc[5, "coherence"] = highest
    most = np.sqrt(252)  # ten over five paths, all equal
    low, high = plot_coherence(frame).get_ylim()
    assert low == 0.5
    assert high > highest
    assert bool(high > most) is shown


def test_the_first_and_the_last_length_of_a_law_are_inside_the_axes() -> None:
    lengths = np.arange(30)
    laws = pd.DataFrame({"path_length": lengths, "num_paths": 1, "gradient_share": np.exp(-((lengths - 15) ** 2) / 8)})
    laws["gradient_share"] /= laws["gradient_share"].sum()
    laws = laws.assign(independent=laws["gradient_share"], interacting=np.nan)
    ax = plot_block_independence(BlockIndependence(laws, 0.0, 0.0, 1.0, 0.0))
    first, last = laws.loc[laws["gradient_share"] > 1e-3, "path_length"].agg(["min", "max"])
    left, right = ax.get_xlim()
    assert left < first - 1 < first - 0.4  # the bar, and the whole mark of the length before it
    assert right > last + 1
    assert right - left < 20


def test_the_text_of_a_window_is_above_its_bars() -> None:
    frame = rp.path_histogram(20).assign(gradient_share=0.05, gradient_share_se=0.02)
    ax = plot_effective_window(frame, "gradient_share")
    ax.figure.draw_without_rendering()
    top = ax.transData.transform((0, 100 * 1.4 * 0.05 / (21 * 0.05)))[1]
    assert ax.texts[0].get_window_extent().y0 > top

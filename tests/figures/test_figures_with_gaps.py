"""Maps of frames that leave numbers out, or begin elsewhere: every cell at its own place."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import resnet_paths as rp
from resnet_paths import figures


@pytest.fixture
def ax():
    yield plt.figure().gca()
    plt.close("all")


def cell(ax, x, y):
    """What is drawn at a place; masked where the map is grey."""
    (mesh,) = ax.collections
    edges = mesh.get_coordinates()
    column, row = np.searchsorted(edges[0, :, 0], x) - 1, np.searchsorted(edges[:, 0, 1], y) - 1
    return np.ma.masked_invalid(mesh.get_array().reshape(edges.shape[0] - 1, -1))[row, column]


def test_pairs_of_some_blocks(ax):
    pairs = [(0, 5, 0.1), (0, 9, 0.2), (5, 9, -0.3)]
    figures.plot_pair_interactions(pd.DataFrame(pairs, columns=["first", "second", "interaction"]), ax)
    for first, second, interaction in pairs:
        assert cell(ax, first, second) == cell(ax, second, first) == pytest.approx(100 * interaction)
    assert all(cell(ax, x, y) is np.ma.masked for x, y in [(4, 0), (0, 4), (5, 5), (8, 5)])


def test_infinite_values_leave_the_colours_of_the_others(ax):
    table = [(0, 1, 0.5), (0, 2, 2.0), (1, 2, np.inf)]
    frame = pd.DataFrame(table, columns=["deleted_index", "block_index", "relative_change"])
    figures.plot_effect_matrix(frame, ax)
    (mesh,) = ax.collections
    assert mesh.get_clim() == (0, 200)
    assert cell(ax, 1, 0) == pytest.approx(50)


def by_source(sources, lengths):
    rows = [(name, index, length, 0.01 * (length + 1)) for name, index in sources for length in lengths]
    frame = pd.DataFrame(rows, columns=["source", "block_index", "path_length", "share"])
    return frame.astype({"block_index": "Int64"})


def test_path_lengths_that_no_path_has(ax):
    figures.plot_prediction_by_source(by_source([("stem", pd.NA), ("b0", 0)], (0, 2, 4)), ax)
    assert [cell(ax, length, 1) for length in (0, 2, 4)] == pytest.approx([1, 3, 5])
    assert all(cell(ax, length, 1) is np.ma.masked for length in (1, 3))


@pytest.mark.parametrize("stored", [False, True])
def test_sources_are_numbered_as_blocks_also_without_those_of_the_stem(ax, stored, tmp_path):
    sources = [*((f"b{i}", i) for i in range(1, 22)), ("head", pd.NA)]
    frame = by_source(sources, (0, 1))
    if stored:
        frame.to_csv(tmp_path / "frame.csv", index=False)
        frame = pd.read_csv(tmp_path / "frame.csv")
    figures.plot_prediction_by_source(frame, ax)
    shown = dict(zip(ax.get_yticks().tolist(), (label.get_text() for label in ax.get_yticklabels()), strict=True))
    assert shown == {9: "10", 19: "20", 21: "head"}


def test_the_lowest_of_joined_frames_is_that_of_the_values(ax):
    ranges = [tuple(range(i, i + n)) for n in (1, 2, 3) for i in range(4)]
    values = [float((7 * blocks[0] + 3 * len(blocks)) % 5) for blocks in ranges]
    frame = pd.DataFrame({"kind": "delete", "blocks": ranges, "cross_entropy_increase": values})
    frame["num_blocks"] = frame.blocks.map(len)
    parts = [part.reset_index(drop=True) for _, part in frame.groupby("num_blocks")]  # labels occur in each
    intact = frame.iloc[:1].assign(blocks=[()])  # as in studies of subsets
    figures.plot_range_deletions(pd.concat([*parts, intact]), ax)
    (line,) = ax.lines
    best = frame.loc[frame.groupby("num_blocks").cross_entropy_increase.idxmin()]
    assert line.get_ydata().tolist() == [1, 2, 3]
    assert line.get_xdata().tolist() == [blocks[0] for blocks in best.blocks]


def test_coherence_of_more_paths_than_a_float_holds(ax):
    counts = rp.path_histogram(2_200).num_paths[[0, 1, 1_100]]
    frame = pd.DataFrame({
        "path_length": [0, 1, 1_100],
        "num_paths": counts,
        "coherence": [1, 5, 9],
        "coherence_se": 0.1,
    })
    assert frame.num_paths.iloc[-1] > 10**600
    figures.plot_coherence(frame, ax)
    most = next(line for line in ax.lines if line.get_label() == "all paths equal").get_ydata()
    assert most[:2] == pytest.approx([1, 2_200**0.5])
    assert np.isfinite(most).all()

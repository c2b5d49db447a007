"""Heat maps of ranges that are deleted or repeated: every cell, the lowest values, what is left out."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import resnet_paths as rp
from resnet_paths.figures import paper_style, plot_range_deletions, plot_range_repeats
from tests.chains import random_chain
from tests.lesions.test_lesions import STEADY, labelled


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    chain, loader = random_chain(STEADY), list(labelled(40))
    each_twice = [rp.Lesion("duplicate", (1, 2)), rp.Lesion("duplicate", (1,))]  # blocks 1, 1, 2, 2 and not 1, 2, 1, 2
    plans = [
        *each_twice,
        *rp.range_deletions(chain),
        *rp.range_repeats(chain),
        *rp.pair_deletions(chain)[-1:],
        lambda c: c,
    ]
    predicted = rp.predicted_effects(chain, loader, span=range(1, 7), progress=False)
    return {"study": rp.lesion_study(chain, loader, plans, progress=False), "predicted": predicted}


def cells(ax: plt.Axes) -> np.ma.MaskedArray:
    (mesh,) = ax.collections
    return np.ma.masked_invalid(mesh.get_array().reshape(mesh._coordinates.shape[0] - 1, -1))


def test_deletions_are_cells_and_the_lowest_of_each_number_is_joined(frames: dict[str, pd.DataFrame]) -> None:
    whole = frames["study"]
    whole = pd.concat([whole, whole[whole.kind == "delete"].head(1)])  # one lesion twice
    for frame, value, scale in (
        (whole, "cross_entropy_increase", 1),
        (whole, "error_rate", 100),
        (frames["predicted"], "angular_distance", 1),
    ):
        ax = plot_range_deletions(frame, plt.figure().gca(), value)
        drawn = cells(ax)
        assert drawn.shape == (6, 6)
        assert drawn.count() == 21
        rows = frame[frame.kind == "delete"] if "kind" in frame else frame
        for row in rows.itertuples():
            assert drawn[len(row.blocks) - 1, row.blocks[0]] == pytest.approx(scale * getattr(row, value))
        (line,) = ax.lines
        lowest = [int(np.nanargmin(drawn[n].filled(np.nan))) for n in range(6)]
        assert line.get_ydata().tolist() == [1, 2, 3, 4, 5, 6]
        assert line.get_xdata().tolist() == lowest
        assert ax.collections[0].cmap.name == "viridis"
        assert ax.get_xlabel() == "first deleted block (index from 0)"
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["lowest of each row"]


def test_repeats_are_cells_and_increases_diverge_from_zero(frames: dict[str, pd.DataFrame]) -> None:
    ax = plot_range_repeats(frames["study"], plt.figure().gca())
    drawn = cells(ax)
    rows = frames["study"][frames["study"].kind == "duplicate_range"]
    assert drawn.count() == len(rows) == 21
    for row in rows.itertuples():
        assert drawn[row.blocks[-1], row.blocks[0]] == pytest.approx(row.cross_entropy_increase)
    (mesh,) = ax.collections
    assert mesh.norm.vmin == -mesh.norm.vmax
    assert (
        plot_range_repeats(frames["study"], plt.figure().gca(), "cross_entropy").collections[0].cmap.name == "viridis"
    )


def test_colours_end_at_percentiles_of_outliers_only_and_the_colour_bar_shows_it() -> None:
    rows = [(tuple(range(i, i + n)), n, 0.01 * i + n) for n in range(1, 9) for i in range(9 - n)]
    frame = pd.DataFrame(rows, columns=["blocks", "num_blocks", "perplexity"]).assign(kind="delete")
    frame.loc[0, "perplexity"] = 1e6
    ax = plot_range_deletions(frame, plt.figure().gca(), "perplexity")
    (mesh,) = ax.collections
    assert mesh.norm.vmax < 10
    assert mesh.norm.vmin == frame.perplexity.min()
    assert mesh.colorbar.extend == "max"
    frame.loc[0, "perplexity"] = -1e6
    (mesh,) = plot_range_deletions(frame, plt.figure().gca(), "perplexity").collections
    assert (mesh.norm.vmin > 0, mesh.colorbar.extend) == (True, "min")
    small = frame[1:].query("num_blocks < 4")
    (mesh,) = plot_range_deletions(small, plt.figure().gca(), "perplexity").collections
    assert (mesh.norm.vmin, mesh.norm.vmax) == (small.perplexity.min(), small.perplexity.max())
    assert mesh.colorbar.extend == "neither"
    assert mesh.colorbar.ax.get_ylabel() == "perplexity"
    missing = frame[frame.num_blocks != 3]
    drawn = cells(plot_range_deletions(missing, plt.figure().gca(), "perplexity"))
    assert drawn.shape == (8, 8)
    assert drawn[2].count() == 0


def test_what_is_no_study_of_ranges(frames: dict[str, pd.DataFrame]) -> None:
    study = frames["study"]
    with pytest.raises(rp.ResnetPathsError, match=r"frame: got \"no row of kind 'duplicate_range'\"; .*range_repeats"):
        plot_range_repeats(study[study.kind == "delete"])
    with pytest.raises(rp.ResnetPathsError, match=r"frame: got \['a'\]; allowed: a frame of lesion_study"):
        plot_range_deletions(pd.DataFrame({"a": [1]}))
    with pytest.raises(rp.ResnetPathsError, match=r"Missing: perplexity"):
        plot_range_deletions(study, value="perplexity")
    with pytest.raises(rp.ResnetPathsError, match="repeated rows"):
        plot_range_deletions(pd.concat([study, study.assign(cross_entropy_increase=0.0)]))
    both = pd.concat([study.assign(network="ours"), study.assign(network="theirs")])
    with pytest.raises(rp.ResnetPathsError, match=r"got \['ours', 'theirs'\]; .*one map for each network"):
        plot_range_repeats(both)
    with pytest.raises(rp.ResnetPathsError, match=r"frame: got 'Tensor'"):
        plot_range_deletions(torch.ones(2))

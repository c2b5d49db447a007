"""Figures of subsets: what is drawn equals numbers computed by plain PyTorch on a small network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.figures import (
    paper_style,
    plot_interaction_spectrum,
    plot_shapley_interactions,
    plot_shapley_values,
)


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with paper_style("single"):
        yield
    plt.close("all")


N = 4


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    """Values of a residual network by the library, and its errors and margins by plain PyTorch."""
    torch.manual_seed(0)
    stem, head = nn.Linear(5, 3).double(), nn.Linear(3, 3).double()
    branches = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(N)]
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
    value_of = {}
    with torch.no_grad():
        for kept in itertools.product([0, 1], repeat=N):
            state = stem(x)
            for gate, branch in zip(kept, branches, strict=True):
                state = state + gate * branch(state)
            logits = head(state)
            right = logits.gather(1, y[:, None])[:, 0]
            margin = right - logits.scatter(1, y[:, None], -torch.inf).max(1)[0]
            value_of[kept] = {
                "error_rate": (logits.argmax(1) != y).double().mean().item(),
                "margin": margin.mean().item(),
            }
    blocks = [
        Block(branch, nn.Identity(), name=f"b{i}", in_shape=(3,), out_shape=(3,)) for i, branch in enumerate(branches)
    ]
    chain = ResidualChain(stem, blocks, head).eval()
    generator = torch.Generator().manual_seed(1)
    found = rp.subset_values(chain, [(x, y)], ["error_rate", "margin"], device="cpu", progress=False)
    sampled = rp.sampled_shapley_values(
        chain, [(x, y)], "margin", generator=generator, num_pairs=16, device="cpu", progress=False
    )
    return {"plain": pd.DataFrame(value_of), "sampled": sampled} | {
        str(measure): rows for measure, rows in found.groupby("measure")
    }


def plain_shapley(values: pd.Series) -> list[float]:
    """By all orders."""
    total = np.zeros(N)
    orders = list(itertools.permutations(range(N)))
    for order in orders:
        kept = [0] * N
        for block in order:
            before = values[tuple(kept)]
            kept[block] = 1
            total[block] += values[tuple(kept)] - before
    return list(total / len(orders))


def points(container: object) -> np.ndarray:
    """What an error bar container draws: heights of its marks."""
    return np.asarray(container[0].get_ydata())  # type: ignore[index]


def test_shapley_and_banzhaf_values_of_plain_pytorch_are_drawn(frames: dict[str, pd.DataFrame]) -> None:
    for measure, scale, label in (("error_rate", 100, "error (points)"), ("margin", 1, "margin (logits)")):
        plain = frames["plain"].loc[measure]
        exact = rp.shapley_values(frames[measure])
        ax = plot_shapley_values(exact, plt.figure().gca())
        shapley, banzhaf = ax.containers
        assert np.allclose(points(shapley), scale * np.array(plain_shapley(plain)), atol=1e-10)
        bits = np.array(list(itertools.product([0, 1], repeat=N)))
        both = [plain[bits[:, i] == 1].mean() - plain[bits[:, i] == 0].mean() for i in range(N)]
        assert np.allclose(points(banzhaf), scale * np.array(both), atol=1e-10)
        assert ax.get_ylabel() == f"contribution to the {label}"
        (bars,) = shapley[2]
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        assert np.allclose(ends, scale * exact[["shapley_low", "shapley_high"]].to_numpy())
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Shapley value", "Banzhaf value"]


def test_sampled_values_alone_and_beside_exact_ones(frames: dict[str, pd.DataFrame]) -> None:
    sampled, exact = frames["sampled"], rp.shapley_values(frames["margin"])
    (alone,) = plot_shapley_values(sampled, plt.figure().gca()).containers
    assert np.allclose(points(alone), sampled.shapley)
    beside = plot_shapley_values(exact, plt.figure().gca(), sampled).containers
    assert np.allclose(points(beside[2]), sampled.shapley)
    with pytest.raises(rp.ResnetPathsError, match=r"frame: got \['error_rate', 'margin'\]; allowed: values of one"):
        plot_shapley_values(rp.shapley_values(frames["error_rate"]), sampled=sampled)
    with pytest.raises(rp.ResnetPathsError, match=r"frame: .*Missing: shapley"):
        plot_shapley_values(exact.drop(columns=["shapley", "banzhaf"]))


def test_interactions_of_plain_pytorch_are_cells(frames: dict[str, pd.DataFrame]) -> None:
    plain = frames["plain"].loc["margin"]
    frame = rp.shapley_interactions(frames["margin"])
    ax = plot_shapley_interactions(frame, plt.figure().gca(), "banzhaf_interaction")
    (mesh,) = ax.collections
    drawn = np.ma.masked_invalid(mesh.get_array().reshape(N, N))
    bits = np.array(list(itertools.product([0, 1], repeat=N)))
    for i, j in itertools.combinations(range(N), 2):
        signs = (2 * bits[:, i] - 1) * (2 * bits[:, j] - 1)
        assert drawn[i, j] == drawn[j, i] == pytest.approx((signs * plain).sum() / 2 ** (N - 2))
    assert drawn.count() == N * (N - 1)
    assert mesh.colorbar.ax.get_ylabel() == "interaction (logits)"
    with pytest.raises(rp.ResnetPathsError, match=r"value: got 'margin'; allowed: one of 'shapley_interaction'"):
        plot_shapley_interactions(frame, value="margin")


def test_the_spectrum_of_plain_pytorch_is_drawn_for_each_measure(frames: dict[str, pd.DataFrame]) -> None:
    spectra = [rp.interaction_spectrum(frames[measure]) for measure in ("margin", "error_rate")]
    ax = plot_interaction_spectrum(pd.concat(spectra), plt.figure().gca())
    signs = 2 * np.array(list(itertools.product([0, 1], repeat=N))) - 1
    for container, measure in zip(ax.containers, ("margin", "error_rate"), strict=True):
        plain = frames["plain"].loc[measure].to_numpy()
        shares = [
            sum(
                np.mean(plain * signs[:, list(members)].prod(1)) ** 2 for members in itertools.combinations(range(N), k)
            )
            / plain.var()
            for k in range(1, N + 1)
        ]
        assert np.allclose(points(container), 100 * np.array(shares), atol=1e-9)
    names = ["added by the choice of examples", "margin", "error_rate"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names
    assert ax.get_legend().legend_handles[0].get_markerfacecolor() == "none"
    alone = plot_interaction_spectrum(spectra[0].drop(columns="measure"), plt.figure().gca())
    assert [text.get_text() for text in alone.get_legend().get_texts()] == names[:1]
    with pytest.raises(rp.ResnetPathsError, match="repeated rows"):
        plot_interaction_spectrum(pd.concat(spectra).drop(columns="measure"))

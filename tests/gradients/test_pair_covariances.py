"""Covariances of pairs of blocks, against the gradients of all paths and the exact split."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import resnet_paths as rp
from resnet_paths import figures
from resnet_paths.gradients import pair_covariances
from tests.gradients.gradient_reference import Recipe, batch, build, path_gradients
from tests.gradients.test_block_independence import FACTORS, multiples
from tests.gradients.test_context import KINDS, chain_of, gated
from tests.gradients.test_context import batch as batch_with_context
from tests.gradients.test_weighted_paths import MIXED

PLAIN = (
    Recipe(3, "identity", post=True),
    Recipe(3, "none"),
    Recipe(4, "projection", 2, pre=True),
    Recipe(4, "identity", deleted=True),
    Recipe(4, "identity", "scaled"),
    Recipe(2, "concat"),
)


def by_enumeration(chain):
    """Shares of single paths, [path, example], and which blocks each takes, [path, block]."""
    gradients = path_gradients(chain, *batch())
    vectors = torch.stack(list(gradients.values()))
    whole = vectors.sum(0)
    shares = (vectors * whole).sum(2) / (whole * whole).sum(1)
    return shares.numpy(), np.array([[bool(entry) for entry in path] for path in gradients], dtype=float)


@pytest.mark.parametrize("recipe", [PLAIN, MIXED], ids=["plain", "nested"])
def test_all_pairs_by_enumeration(recipe):
    chain = build(recipe)
    shares, taken = by_enumeration(chain)
    frame = pair_covariances(chain, *batch())
    assert list(zip(frame["first"], frame["second"], strict=True)) == [
        *itertools.combinations_with_replacement(range(len(chain)), 2)
    ]
    both = np.einsum("pe,pi,pj->ije", shares, taken, taken)
    one = np.einsum("pe,pi->ie", shares, taken)
    rows = (frame["first"], frame["second"])
    np.testing.assert_allclose(frame.gradient_share_through_both, both.mean(2)[rows], atol=1e-12)
    means = one.mean(1)
    np.testing.assert_allclose(frame.covariance, (both.mean(2) - np.outer(means, means))[rows], atol=1e-12)
    np.testing.assert_allclose(
        frame.gradient_share_through_both_se, (both.std(2, ddof=1) / np.sqrt(both.shape[2]))[rows], atol=1e-12
    )
    # To first order, by the jackknife's influences.
    changes = both - means[:, None, None] * one[None] - means[None, :, None] * one[:, None]
    expected = changes.std(2, ddof=1) / np.sqrt(both.shape[2])
    np.testing.assert_allclose(frame.covariance_se, expected[rows], atol=1e-12)
    assert frame.first_block.tolist() == [chain[i].name for i in frame["first"]]
    assert frame.second_stage.tolist() == [chain[i].stage for i in frame["second"]]


def variance_of(frame):
    split = frame.gradient_share
    mean = (frame.path_length * split).sum()
    return ((frame.path_length - mean) ** 2 * split).sum()


@pytest.mark.parametrize("place", ["input", "stem", 1])
def test_covariances_add_up_to_the_variance_of_path_length(place):
    chain = build(PLAIN)
    frame = pair_covariances(chain, *batch(), with_respect_to=place)
    twice = np.where(frame["first"] == frame["second"], 1, 2)
    split = rp.gradient_by_path_length(chain, *batch(), with_respect_to=place)
    assert twice @ frame.covariance == pytest.approx(variance_of(split), abs=1e-12)
    own = frame[frame["first"] == frame["second"]]
    through = rp.gradient_through_block(chain, *batch(), with_respect_to=place)
    shares = through.gradient_share_through_branch
    np.testing.assert_allclose(own.gradient_share_through_both, shares, atol=1e-12)
    np.testing.assert_allclose(own.covariance, shares * (1 - shares), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["input", "stem"])
def test_pairs_of_blocks_that_read_context(kind, place):
    """By autograd with gates that shut the branches of one block or of two."""

    def without(*blocks):
        return gated(kind, lambda position: float(position[0] not in blocks), place)

    whole = without()
    frame = pair_covariances(chain_of(kind), *batch_with_context(), with_respect_to=place, progress=False)
    for row in frame.itertuples():
        through = whole - without(row.first) - without(row.second) + without(row.first, row.second)
        share = ((through * whole).sum(1) / (whole * whole).sum(1)).mean()
        assert row.gradient_share_through_both == pytest.approx(float(share), abs=1e-12)


def test_independent_blocks_have_no_covariance():
    frame = pair_covariances(multiples(FACTORS), *batch())
    np.testing.assert_allclose(frame.covariance[frame["first"] != frame["second"]], 0, atol=1e-12)


def test_a_loader_is_one_set_of_examples():
    chain, (inputs, targets) = build(PLAIN), batch(5)
    whole = pair_covariances(chain, inputs, targets)
    parts = pair_covariances(chain, [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])], progress=False)
    np.testing.assert_allclose(parts.covariance, whole.covariance, atol=1e-13)
    np.testing.assert_allclose(parts.covariance_se, whole.covariance_se, atol=1e-13)
    small = pair_covariances(chain, inputs, targets, memory_budget=1)
    np.testing.assert_allclose(small.covariance, whole.covariance, atol=1e-13)


def test_parameters_are_no_place():
    with pytest.raises(rp.ResnetPathsError, match="with_respect_to"):
        pair_covariances(build(PLAIN), *batch(), with_respect_to=("parameters", 0))


def test_the_figure_is_symmetric_and_marks_stages():
    chain = build(PLAIN)
    frame = pair_covariances(chain, *batch())
    fig, ax = plt.subplots()
    figures.plot_pair_covariances(frame, ax)
    drawn = np.ma.filled(ax.collections[0].get_array(), np.nan)
    np.testing.assert_array_equal(drawn, drawn.T)
    pairs = frame[frame["first"] != frame["second"]]
    np.testing.assert_allclose(drawn[pairs["first"], pairs["second"]], pairs.covariance)
    assert np.isnan(np.diag(drawn)).all()
    borders = [i - 0.5 for i in range(1, len(chain)) if chain[i].stage != chain[i - 1].stage]
    assert sorted({line.get_xdata()[0] for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[1]}) == borders
    plt.close(fig)
    with pytest.raises(rp.ResnetPathsError, match="at least two blocks"):
        figures.plot_pair_covariances(frame[frame["first"] == frame["second"]])

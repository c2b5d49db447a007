"""The law of path length beside that of independent blocks, and the factors of decay, against enumeration."""

from __future__ import annotations

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import resnet_paths as rp
from resnet_paths import figures
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.parts import LinearCombination
from resnet_paths.gradients import block_independence, branch_probabilities, decay_factors, poisson_binomial
from tests.gradients.gradient_reference import Recipe, batch, build, path_gradients, seeded


def test_poisson_binomial_by_enumeration():
    probabilities = [0.3, 0.9, -0.2, 0.55, 1.1]
    expected = np.zeros(6)
    for taken in itertools.product((False, True), repeat=5):
        expected[sum(taken)] += math.prod(p if t else 1 - p for p, t in zip(probabilities, taken, strict=True))
    np.testing.assert_allclose(poisson_binomial(pd.Series(probabilities)), expected, atol=1e-15)
    assert poisson_binomial([]).tolist() == [1.0]
    with pytest.raises(rp.ResnetPathsError, match="probabilities"):
        poisson_binomial([0.5, float("nan")])


def multiples(factors):
    """Blocks x + a x: truly independent, with shares a / (1 + a)."""
    blocks = [
        rp.Block(LinearCombination([torch.nn.Identity()], [a]), torch.nn.Identity(), name=f"block{i}")
        for i, a in enumerate(factors)
    ]
    with seeded():
        return ResidualChain(torch.nn.Linear(5, 3), blocks, torch.nn.Linear(3, 3)).double().eval()


FACTORS = np.array([0.5, 0.1, 2.0, 0.7])


def frames_of(chain):
    data = batch()
    return rp.gradient_by_path_length(chain, *data), rp.gradient_through_block(chain, *data)


def test_independent_blocks_are_found_independent():
    found = block_independence(*frames_of(multiples(FACTORS)))
    np.testing.assert_allclose(found.laws.independent, poisson_binomial(FACTORS / (1 + FACTORS)))
    np.testing.assert_allclose(found.laws.interacting, found.laws.gradient_share, atol=1e-7)
    assert (found.total_variation, found.variance_ratio, found.interaction) == pytest.approx((0, 1, 0), abs=1e-7)


def test_probabilities_are_those_of_the_branches():
    chain = multiples(FACTORS)
    for power in (1, 2):
        frame = branch_probabilities(chain, *batch(), power=power)
        np.testing.assert_allclose(frame.probability, FACTORS**power / (1 + FACTORS**power))
        assert (frame.probability_se < 1e-12).all()
        # Coherent paths have the energies and magnitudes of the product measure.
        norms = [float(v.norm(dim=1).mean()) for v in path_gradients(chain, *batch()).values()]
        magnitudes = np.array(norms) ** power
        lengths = np.array([sum(path) for path in path_gradients(chain, *batch())])
        law = np.bincount(lengths, magnitudes) / magnitudes.sum()
        np.testing.assert_allclose(poisson_binomial(frame.probability), law, atol=1e-12)
    ends = build((Recipe(3, "none"), Recipe(3, "identity", deleted=True), Recipe(3, "identity", 2)))
    assert branch_probabilities(ends, *batch()).probability[:2].tolist() == [1.0, 0.0]


def test_an_interaction_is_found_again():
    """A law made by a quadratic tilt has its number as the interaction."""
    through = pd.DataFrame({"gradient_share_through_branch": [0.3, 0.4, 0.5, 0.6, 0.7, 0.5]})
    lengths = np.arange(7)
    tilted = poisson_binomial(through.gradient_share_through_branch) * np.exp(0.15 * (lengths - 3.0) ** 2)
    split = pd.DataFrame({"path_length": lengths, "gradient_share": tilted / tilted.sum()})
    found = block_independence(split, through)  # symmetric, so that the mean stays
    assert found.interaction == pytest.approx(0.15, abs=1e-6)
    np.testing.assert_allclose(found.laws.interacting, split.gradient_share, atol=1e-7)
    variance = float((lengths - 3.0) ** 2 @ split.gradient_share)
    shares = through.gradient_share_through_branch
    assert found.variance_ratio == pytest.approx(variance / (shares * (1 - shares)).sum())
    assert found.variance_ratio > 1


def test_shares_outside_0_and_1_have_no_interaction_number():
    through = pd.DataFrame({"gradient_share_through_branch": [1.5, -0.5]})
    split = pd.DataFrame({"path_length": [0, 1, 2], "gradient_share": [0.2, 0.6, 0.2]})
    found = block_independence(split, through)
    assert np.isnan(found.interaction)
    assert found.total_variation == pytest.approx(abs(np.array([0.2, 0.6, 0.2]) - [-0.75, 2.5, -0.75]).sum() / 2)


def test_frames_of_other_examples_are_refused():
    split, through = frames_of(multiples(FACTORS))
    with pytest.raises(rp.ResnetPathsError, match=r"through: got .*the same examples and place"):
        block_independence(split, through.iloc[1:])
    with pytest.raises(rp.ResnetPathsError, match=r"through: .*columns gradient_share_through_branch"):
        block_independence(split, split)


def test_the_figure_draws_the_laws():
    chain = multiples(FACTORS)
    found = block_independence(*frames_of(chain))
    with figures.paper_style("single"):
        fig, ax = plt.subplots()
        figures.plot_block_independence(found, ax=ax)
        np.testing.assert_allclose([bar.get_height() for bar in ax.patches], 100 * found.laws.gradient_share)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), 100 * found.laws.independent)
        assert len(ax.get_legend().get_texts()) == 3
        plt.close(fig)
    with pytest.raises(rp.ResnetPathsError, match="independence"):
        figures.plot_block_independence(found.laws)


@pytest.mark.filterwarnings("ignore:At path lengths")
@pytest.mark.parametrize(("per_example", "least"), [(False, 1 / 1.6), (True, 1 / 3)])
def test_errors_of_decay_factors_over_repeats(per_example, least):
    """Right if the paths of each length are drawn independently, too large for populations of paths of all lengths."""
    chain = build((Recipe(3, "identity"),) * 8)
    options = {"method": "sampled", "num_draws": 12, "max_length": 4, "per_example": per_example}
    frames = [
        decay_factors(
            rp.gradient_by_path_length(chain, *batch(), generator=torch.Generator().manual_seed(seed), **options)
        )
        for seed in range(30)
    ]
    truth = decay_factors(rp.gradient_by_path_length(chain, *batch(), **{**options, "num_draws": 100}))
    assert truth.path_length.tolist() == [1, 2, 3, 4]
    assert (truth.factor_se == 0).all()  # all paths
    found = np.array([frame.factor for frame in frames])[:, 2:]
    stated = np.sqrt((np.array([frame.factor_se for frame in frames])[:, 2:] ** 2).mean(0))
    spread = np.sqrt(((found - truth.factor.to_numpy()[2:]) ** 2).mean(0))
    assert ((spread / stated > least) & (spread / stated < 1.6)).all(), spread / stated
    held = [(f.factor_low[2:] <= truth.factor[2:]) & (truth.factor[2:] <= f.factor_high[2:]) for f in frames]
    assert np.mean(held) > 0.85

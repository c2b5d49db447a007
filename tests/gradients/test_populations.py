"""Populations of paths: which are kept, what is expected of the others, and the estimates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import resnet_paths as rp
from resnet_paths.core.backward.completions import completions, nothing_below
from resnet_paths.core.backward.cotangents import Cotangents, Stack
from resnet_paths.core.backward.populations import Population
from resnet_paths.core.paths import InBranch, path_length
from resnet_paths.gradients.populations import Chooser, kept
from tests.gradients.gradient_reference import batch, build, path_gradients
from tests.gradients.test_weighted_paths import MIXED, generator_of, norms_by_length, scaled_identities

# Which paths are kept


def some_scores(seed=0, rows=12, examples=3):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.7, (rows, examples)), rng.integers(0, 4, (rows, examples))


@pytest.mark.parametrize("number", [1, 4, 11])
def test_sums_over_those_that_are_kept_are_unbiased(number):
    """Over all uniforms, on a grid much finer than the probabilities."""
    logs, lengths = some_scores()
    values = np.random.default_rng(1).random(logs.shape)
    found = []
    for uniform in (np.arange(2000) + 0.5) / 2000:
        rows, log_probabilities = kept(logs, lengths, number, np.full(logs.shape[1], uniform))
        assert all(len(set(column)) == number for column in rows.T)
        found.append((np.take_along_axis(values, rows, 0) * np.exp(-log_probabilities)).sum(0))
    np.testing.assert_allclose(np.mean(found, 0), values.sum(0), rtol=0.02)


def test_the_largest_are_kept_for_certain_and_the_others_with_equal_scores_for_their_weights():
    scores = np.array([100.0, 1, 2, 3, 50, 1])[:, None]
    for uniform in np.linspace(0, 0.99, 23):
        rows, logs = kept(np.log(scores), np.zeros((6, 1), dtype=int), 4, np.array([uniform]))
        weights = scores[rows[:, 0], 0] / np.exp(logs[:, 0])
        found = dict(zip(rows[:, 0].tolist(), weights, strict=True))
        assert found[0] == 100
        assert found[4] == 50
        others = [weight for row, weight in found.items() if row not in (0, 4)]
        np.testing.assert_allclose(others, 7 / 2)


def test_numbers_of_each_length_vary_by_one_at_most():
    logs, lengths = np.zeros((40, 1)), np.repeat([0, 1, 2, 3], 10)[:, None]
    for uniform in np.linspace(0, 0.99, 17):
        rows, _ = kept(logs, lengths, 10, np.array([uniform]))
        assert set(np.bincount(lengths[rows[:, 0], 0]).tolist()) <= {2, 3}


def test_paths_without_a_score_are_left_out():
    logs = np.array([[-np.inf, -np.inf], [0.0, -np.inf], [-np.inf, -np.inf]])
    rows, log_probabilities = kept(logs, np.zeros((3, 2), dtype=int), 2, np.zeros(2))
    assert rows[np.isfinite(log_probabilities[:, 0]), 0].tolist() == [1]


def test_a_path_of_which_next_to_nothing_is_expected_has_a_chance():
    """Its weight stays below the reciprocal of a hundredth of a chance of 1 in 3, where it would be a billion."""
    tensors = torch.tensor([1.0, 1.0, 1e-9], dtype=torch.float64)[:, None, None, None]
    stack = Stack(tensors, torch.zeros(3, 1, 1, dtype=torch.int32))
    population = Population(Cotangents(stack, {}), np.zeros((3, 1), dtype=int), np.zeros((3, 1)))
    weights = []
    for seed in range(1000):
        chosen = Chooser(2, [0], np.ones((2, 1)), [np.random.default_rng(seed)])(population, nothing_below(1, 0))
        weights += np.exp(chosen.log_weights[chosen.log_norms() < math.log(1e-6)]).tolist()
    assert 3 <= len(weights) <= 50
    assert max(weights) < 300
    assert sum(weights) / 1000 == pytest.approx(1, abs=0.5)


# What is expected


def gains_of(*ratios):
    """Of blocks whose branch has a ratio of the norm after the skip."""
    return [[(torch.zeros(1), None), (torch.full((1,), math.log(ratio)), None)] for ratio in ratios]


def test_completions_are_elementary_symmetric_polynomials():
    ratios = [0.3, 2.0, 0.01, 1.1]
    found = completions(gains_of(*ratios), ((False, True),) * 4, nothing_below(1, 4))
    for power in (1, 2):
        for index, k in itertools.product(range(5), range(5)):
            symmetric = sum(math.prod(r**power for r in some) for some in itertools.combinations(ratios[:index], k))
            scale = math.prod(max(r, 1) ** power for r in ratios[:index])  # odds are relative to the larger entry
            assert math.exp(found[index][power - 1, 0, k]) == pytest.approx(symmetric / scale)


def test_a_chain_in_a_branch_has_the_odds_of_the_branch_in_all():
    inner = gains_of(1.0, 1.0)
    gains = [[(torch.zeros(1), None), (torch.full((1,), math.log(0.4)), inner)]]
    choices = ((False, InBranch(((False, True),) * 2, 1)),)
    (_, found) = completions(gains, choices, nothing_below(1, 3))
    np.testing.assert_allclose(np.exp(found[0, 0]), [1, 0.4 / 4, 0.4 / 2, 0.4 / 4])


# The estimates


def test_estimates_are_unbiased():
    """Of a chain with alternatives and a nested chain, with few paths kept."""
    chain = build(MIXED)
    norms = norms_by_length(path_gradients(chain, *batch()))
    found = []
    for seed in range(6):
        frame = rp.gradient_by_path_length(
            chain, *batch(), method="sampled", num_draws=12, generator=generator_of(seed)
        )
        found.append([frame.mean_path_gradient_norm, frame.rms_path_gradient_norm**2])
    truth = np.array([[(v**power).mean() for v in norms.values()] for power in (1, 2)])
    relative = np.array(found) / truth
    error = relative.std(0, ddof=1) / math.sqrt(len(relative))
    assert (abs(relative.mean(0) - 1) <= 6 * error + 1e-12).all()
    assert (error[:, 2:6] > 0).all()


def test_the_work_is_that_of_the_populations():
    chain = scaled_identities([0.5] * 6)
    frame = rp.gradient_by_path_length(chain, *batch(3), method="sampled", num_draws=8)
    # Lengths 0, 1, 5 and 6 have at most 8 paths; 21 populations grow to 8 paths.
    assert frame.attrs["num_block_vjps"] == 6 + 5 * 6 + 6 + 21 * (1 + 2 + 4 + 8 + 8 + 8)
    assert frame.num_draws[[0, 1, 5, 6]].tolist() == [1, 6, 6, 1]


def test_all_paths_are_measured_where_that_takes_a_tenth_of_what_populations_take():
    chain = scaled_identities([0.5] * 12)
    frame = rp.gradient_by_path_length(chain, *batch(60), method="sampled")
    # Of 60 examples there are four populations of 64 paths or more.
    exact = [k for k in range(13) if k * math.comb(12, k) <= 4 * 64 * 12 / 10]
    assert exact == [0, 1, 2, 11, 12]
    assert frame.path_length[frame.mean_path_gradient_norm_se == 0].tolist() == exact
    assert frame.num_draws[exact].tolist() == [math.comb(12, k) for k in exact]


@pytest.mark.parametrize(("num_examples", "num_paths"), [(1, 128), (4, 128), (6, 85), (60, 64)])
def test_populations_of_fewer_examples_have_more_paths(num_examples, num_paths):
    chain = scaled_identities([0.5] * 24)
    frame = rp.gradient_by_path_length(chain, *batch(num_examples), method="sampled")
    num_populations = max(4, 1 + math.ceil(60 / num_examples))
    to_enumerate = [k * math.comb(24, k) for k in range(25)]
    exact = sum(vjps for vjps in to_enumerate if vjps <= num_paths * num_populations * 24 / 10)
    of_population = sum(min(2**block, num_paths) for block in range(24))
    assert frame.attrs["num_block_vjps"] == exact + num_populations * of_population


def test_path_lengths_of_mixed_chains_are_those_of_paths():
    chain = build(MIXED)
    frame = rp.gradient_by_path_length(chain, *batch(), method="sampled", num_draws=30)
    assert frame.path_length.tolist() == sorted({path_length(path) for path in rp.enumerate_paths(chain)})
    assert frame.num_draws.tolist()[0] == frame.num_paths.tolist()[0]
    assert not frame.mean_path_gradient_norm.isna().any()

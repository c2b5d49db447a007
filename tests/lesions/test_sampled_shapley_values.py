"""Shapley values from random orders: against exact ones, and their intervals against their rate."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import resnet_paths as rp
from resnet_paths.lesions import permutations
from tests.chains import Plan, random_chain
from tests.lesions.test_lesions import labelled
from tests.lesions.test_subset_values import MIXED, game, shapley_of_orders

LOADER = list(labelled(20))


def sampled(chain, loader=LOADER, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return rp.sampled_shapley_values(chain, loader, generator=generator, progress=False, **options)


def test_estimates_are_near_the_exact_values_with_the_errors_that_they_state():
    chain = random_chain(MIXED)
    exact = rp.shapley_values(rp.subset_values(chain, LOADER, progress=False))
    frame = sampled(chain, num_pairs=64)
    assert frame.block.tolist() == exact.block.tolist()
    assert (abs(frame.shapley - exact.shapley) < 4 * frame.shapley_se).all()
    assert np.allclose(frame.shapley_high - frame.shapley, frame.shapley - frame.shapley_low)
    assert frame.attrs["total"] == pytest.approx(exact.shapley.sum(), abs=1e-12)
    assert (frame.variance_ratio < 0.5).all()
    # Both errors: the draws', and that of the examples, which the exact values have too.
    of_examples = np.sqrt(frame.shapley_examples_se**2 - frame.shapley_se**2)
    assert np.allclose(of_examples, exact.shapley_se, rtol=0.1)
    # Each of the 64 pairs has 6 subsets in either direction; the projection runs in all of them.
    assert frame.attrs["block_evaluations_naive"] == 64 * 6 * (5 + 1)
    assert frame.attrs["block_evaluations"] < 2**5 + 30


def test_they_stop_at_the_relative_error(monkeypatch):
    chain = random_chain((3, tuple(Plan(3, "identity", False, False) for _ in range(7))), seed=3)
    wide, narrow = sampled(chain, relative_error=0.9), sampled(chain, relative_error=0.02)
    assert wide.num_pairs[0] == 16
    assert narrow.num_pairs[0] > 16
    for frame, most in ((wide, 0.9), (narrow, 0.02)):
        stated = np.sqrt((frame.shapley_se**2).sum() / (frame.shapley**2).sum())
        assert frame.attrs["relative_error"] == pytest.approx(stated)
        assert stated <= most
    same = sampled(chain, num_pairs=int(narrow.num_pairs[0]))
    assert np.allclose(same.shapley, narrow.shapley, atol=1e-12)
    monkeypatch.setattr(permutations, "_MOST_PAIRS", 20)
    with pytest.warns(UserWarning, match=r"20 pairs of orders have a relative error of .*, above 0\.0001"):
        sampled(chain, relative_error=1e-4)


@pytest.mark.parametrize("scores", [None, [1.0, 0.0, 0.0, 2.0, 0.5], torch.ones(5).tolist()])
def test_an_additive_value_is_exact(scores, monkeypatch):
    monkeypatch.setattr(permutations, "_Known", AdditiveGame)
    frame = sampled(random_chain(MIXED), num_pairs=16, scores=scores)
    assert np.allclose(frame.shapley, [1.0, -2.0, 0.5, 3.0, 0.0], atol=1e-12)
    assert np.allclose(frame.shapley_se, 0, atol=1e-12)


class AdditiveGame(permutations._Known):
    """Values that are sums over blocks."""

    def measure(self, orders):
        for number in range(32):
            self.value_of[number] = sum(w for i, w in enumerate([1.0, -2.0, 0.5, 3.0, 0.0]) if number >> i & 1)
            self.influences[number] = np.zeros(3)


def test_controls_have_the_mean_zero():
    """Over all orders of five blocks, by enumeration."""
    generator = np.random.default_rng(0)
    for scores in (np.ones(5), generator.random(5), np.array([1.0, 0, 0, 0, 0])):
        places = np.array(list(itertools.permutations(range(5))))
        for block in range(5):
            before = places < places[:, [block]]
            assert permutations._control(before, block, scores).mean() == pytest.approx(0, abs=1e-12)
            reverse = permutations._control((4 - places) < (4 - places)[:, [block]], block, scores)
            assert np.allclose(permutations._control(before, block, scores), reverse)


def test_intervals_hold_the_exact_value_at_their_rate():
    """200 samples of 32 pairs of a game in which blocks saturate, as those of a network do."""
    generator = np.random.default_rng(0)
    n, weights = 6, np.array([0.2, 2.0, 0.5, 1.0, 0.1, 1.5])
    bits = np.array([[number >> i & 1 for i in range(n)] for number in range(2**n)])
    values = np.tanh(bits @ weights - 2) + 0.3 * generator.normal(size=2**n)
    exact = rp.shapley_values(game(values)).shapley.to_numpy()
    by_orders = shapley_of_orders({tuple(np.flatnonzero(row)): v for row, v in zip(bits, values, strict=True)}, n)
    assert np.allclose(exact, by_orders, atol=1e-12)
    known = SimpleNamespace(
        chosen=list(range(n)), value_of=dict(enumerate(values)), influences=dict.fromkeys(range(2**n), np.zeros(2))
    )
    inside, errors, estimates = [], [], []
    for _ in range(200):
        found = permutations._Found.of(known, [generator.permutation(n) for _ in range(32)], None)
        half = 2.045 * found.errors  # Student's t with 29 degrees of freedom
        inside.append(abs(found.shapley - exact) <= half)
        errors.append(found.errors)
        estimates.append(found.shapley)
    assert 0.93 < np.mean(inside) < 0.965
    # The stated errors are those of repeated samples, or a little above; the estimates have no bias beyond theirs.
    ratios = np.sqrt(np.mean(np.square(errors), 0)) / np.std(estimates, 0)
    assert (ratios > 0.9).all()
    assert (ratios < 1.25).all()
    assert (abs(np.mean(estimates, 0) - exact) < 4 * np.std(estimates, 0) / np.sqrt(200)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [0]}, r"blocks: got '1 blocks'; allowed: two blocks at least"),
        ({"scores": [1.0] * 4}, r"scores: got .*; allowed: 5 finite numbers"),
        ({"num_pairs": 15}, r"num_pairs: got 15; allowed: an int of at least 16"),
        ({"loader": iter(LOADER)}, r"loader: got .*Pass list\(loader\)"),
        ({"relative_error": 1}, r"relative_error: got 1; allowed: a number between 0 and 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        sampled(random_chain(MIXED), **options)

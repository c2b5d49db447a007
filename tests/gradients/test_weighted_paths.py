"""Weighted paths: how they are drawn, what is estimated from them, and the errors that they state."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.parts import LinearCombination
from resnet_paths.core.paths import enumerate_paths, path_length
from resnet_paths.gradients.importance import WeightedNorms, mean_of
from resnet_paths.gradients.points import Place, Point
from resnet_paths.gradients.weighted import Proposal, WeightedPaths
from tests.gradients.gradient_reference import Recipe, assert_close, batch, build, path_gradients, seeded, summed

MIXED = (
    Recipe(3, "identity"),
    Recipe(3, "identity", 2, post=True),
    Recipe(2, "projection"),
    Recipe(2, "none", 2),
    Recipe(2, "identity", (Recipe(2, "identity"), Recipe(2, "identity", 2))),
    Recipe(2, "identity", "scaled", pre=True),
    Recipe(2, "identity"),
)


def estimated(chain, *data, **options):
    return rp.gradient_by_path_length(chain, *data, **{"method": "energy", "num_draws": 40} | options)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def norms_by_length(gradients):
    groups = {}
    for path, vector in gradients.items():
        groups.setdefault(path_length(path), []).append(vector.norm(dim=1))
    return {k: torch.stack(groups[k]).numpy() for k in sorted(groups)}


@pytest.fixture(scope="module")
def mixed():
    """A chain with alternatives and a nested chain, and the norms of all its paths."""
    chain = build(MIXED)
    return chain, norms_by_length(path_gradients(chain, *batch()))


# How paths are drawn


def uniforms_of(seed):
    return iter(np.random.default_rng(seed).random(200_000).tolist())


def proposal_of(chain, inputs, targets):
    (point,) = Place.of(chain, "input").points(inputs, targets, None, 2**31, 1)
    return Proposal.of(chain.path_choices, [point.gains()])


def test_probabilities_of_all_paths_of_a_length_sum_to_1(mixed):
    proposal = proposal_of(mixed[0], *batch())
    for k in mixed[1]:
        logs = [proposal.log_probability(path, k) for path in enumerate_paths(mixed[0], k)]
        assert np.exp(logs).sum() == pytest.approx(1, abs=1e-12)


def test_paths_occur_as_often_as_their_probabilities_say(mixed):
    proposal, uniforms = proposal_of(mixed[0], *batch()), uniforms_of(1)
    paths = list(enumerate_paths(mixed[0], 3))
    expected = 4000 * np.exp([proposal.log_probability(path, 3) for path in paths])
    counts = Counter(proposal.draw(3, uniforms) for _ in range(4000))
    assert set(counts) <= set(paths)
    found = np.array([counts[path] for path in paths])
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < len(paths) + 4 * math.sqrt(2 * len(paths))


def test_conditional_poisson_sampling_has_the_textbook_probabilities():
    odds = [0.3, 2.0, 0.01, 1.1]
    drawn = WeightedPaths(((False, True),) * 4, [[(0.0, None), (math.log(a), None)] for a in odds])
    for k in range(5):
        symmetric = sum(math.prod(some) for some in itertools.combinations(odds, k))
        assert math.exp(drawn.log_totals[k]) == pytest.approx(symmetric)
    assert math.exp(drawn.log_probability((True, False, False, True), 2)) == pytest.approx(
        0.3 * 1.1 / math.exp(drawn.log_totals[2])
    )


def test_odds_are_those_of_the_whole_gradient():
    """Blocks x + a x: the branch has a times the gradient of the skip."""
    factors = [0.5, 0.1, 2.0]
    proposal = proposal_of(scaled_identities(factors), *batch())
    for part, power in zip(proposal.parts, (0.5, 1, 1.5, 2), strict=True):
        one = [math.exp(part.log_probability(path, 1)) for path in enumerate_paths(3, 1)]
        expected = np.array(factors[::-1]) ** power
        np.testing.assert_allclose(one, expected / expected.sum())


def scaled_identities(factors):
    blocks = [
        rp.Block(LinearCombination([torch.nn.Identity()], [a]), torch.nn.Identity(), name=f"{i}")
        for i, a in enumerate(factors)
    ]
    with seeded():
        return ResidualChain(torch.nn.Linear(5, 3), blocks, torch.nn.Linear(3, 3)).double().eval()


# What is estimated


def test_all_paths_are_measured_where_that_takes_no_more(mixed):
    chain, norms = mixed
    frame = estimated(chain, *batch(), num_draws=1000)
    assert_close(frame.mean_path_gradient_norm, [v.mean() for v in norms.values()])
    assert_close(frame.rms_path_gradient_norm, [np.sqrt((v**2).mean()) for v in norms.values()])
    sums = torch.stack(list(summed(path_gradients(chain, *batch())).values())).norm(dim=2).numpy()
    energy = np.array([(v**2).sum(0).mean() for v in norms.values()])
    assert_close(frame.coherence, np.sqrt((sums**2).mean(1) / energy))
    assert_close(frame.uncancelled_share, sums.mean(1) / [v.sum(0).mean() for v in norms.values()])
    assert_close(frame.total_gradient_magnitude, [v.sum(0).mean() for v in norms.values()])
    assert (frame.filter(regex="norm_se$|coherence_se|share_se$").drop(columns=EXACT_ERRORS) == 0).all(axis=None)
    assert frame.num_draws.tolist() == frame.num_paths.tolist()
    exact = rp.gradient_by_path_length(chain, *batch())
    pd.testing.assert_frame_equal(frame[exact.columns], exact)


EXACT_ERRORS = ["summed_path_gradient_norm_se", "gradient_share_se"]


def test_estimates_and_the_work_that_they_take(mixed, monkeypatch):
    chain, norms = mixed
    taken = []
    of_paths = Point.of_paths
    monkeypatch.setattr(Point, "of_paths", lambda self, paths: (taken.extend(paths), of_paths(self, paths))[1])
    options = {"method": "sampled", "num_draws": 60, "per_example": False}
    frame = estimated(chain, *batch(), **options, generator=generator_of(3))
    assert frame.attrs["num_block_vjps"] == sum(map(path_length, taken))
    assert len(taken) == len(set(taken))  # a path that is drawn twice is measured once
    norms = {k: np.sqrt((v**2).sum(1, keepdims=True)) / 3 for k, v in norms.items()}
    drawn = [min(60, count) for count in frame.num_paths]
    assert frame.num_draws.tolist() == drawn
    assert "coherence" not in frame
    assert (frame.effective_sample_size <= frame.num_draws + 1e-9).all()
    for name, values in (
        ("mean", [v.mean() for v in norms.values()]),
        ("rms", [np.sqrt((v**2).mean()) for v in norms.values()]),
    ):
        found, error = (frame[f"{name}_path_gradient_norm{suffix}"] for suffix in ("", "_se"))
        assert (abs(found - values) <= 4 * error + 1e-12).all()
        low, high = (frame[f"{name}_path_gradient_norm{suffix}"] for suffix in ("_low", "_high"))
        assert ((low <= found) & (found <= high)).all()


def test_paths_are_drawn_until_the_error_is_reached():
    chain = build((*MIXED, *[Recipe(2, "identity")] * 6))
    drawn = []
    for wanted in (0.1, 0.005):
        frame = estimated(chain, *batch(), num_draws=None, relative_error=wanted)
        relative = frame.mean_path_gradient_norm_se / frame.mean_path_gradient_norm
        worth = frame.total_gradient_magnitude >= frame.total_gradient_magnitude.sum() / 1000
        assert (relative[worth] <= wanted).all()
        energy = 2 * frame.rms_path_gradient_norm_se / frame.rms_path_gradient_norm
        total = frame.rms_path_gradient_norm**2 * frame.num_paths.astype(float)
        assert (energy[total >= total.sum() / 1000] <= wanted).all()
        drawn.append(frame.num_draws.sum())
    assert drawn[0] < drawn[1]


def test_coherent_chains():
    frame = estimated(scaled_identities([0.5] * 10), *batch())
    expected = [math.sqrt(math.comb(10, k)) for k in range(11)]
    assert (abs(frame.coherence - expected) <= 4 * frame.coherence_se + 1e-12).all()
    assert (frame.coherence_se <= 0.05 * frame.coherence).all()


def test_coherent_chains_are_known_without_error_where_examples_share_their_paths():
    frame = estimated(scaled_identities([0.5] * 10), *batch(1), per_example=False)
    np.testing.assert_allclose(frame.coherence, [math.sqrt(math.comb(10, k)) for k in range(11)])
    np.testing.assert_allclose(frame.uncancelled_share, 1)
    np.testing.assert_allclose(frame.effective_sample_size, frame.num_draws)
    assert (frame.mean_path_gradient_norm_se <= 1e-12 * frame.mean_path_gradient_norm).all()
    np.testing.assert_allclose(frame.total_gradient_magnitude, frame.summed_path_gradient_norm)


@pytest.mark.parametrize("place", ["stem", 1, ("parameters", 2)])
def test_other_places(place):
    chain = build(MIXED[1:4])
    expected = norms_by_length(path_gradients(chain, *batch(), place))
    frame = estimated(chain, *batch(), with_respect_to=place, method="sampled", num_draws=500)
    assert_close(frame.mean_path_gradient_norm, [v.mean() for v in expected.values()])


def test_a_small_memory_and_a_batch_as_one_measurement(mixed):
    chain, _ = mixed
    frames = [estimated(chain, *batch(5), memory_budget=budget) for budget in (2**31, 1)]
    for name in frames[0].columns[2:-1]:
        assert_close(frames[1][name], frames[0][name])
    frame = estimated(chain, *batch(5), num_draws=1000, per_example=False)
    norms = norms_by_length(path_gradients(chain, *batch(5)))
    assert_close(frame.mean_path_gradient_norm, [np.sqrt((v**2).sum(1)).mean() / 5 for v in norms.values()])
    assert frame.mean_path_gradient_norm_examples_se.isna().all()


def test_batches_of_a_loader_draw_their_own_paths(mixed):
    chain, _ = mixed
    inputs, targets = batch(5)
    loader = [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]
    frame = estimated(chain, loader, num_draws=1000, progress=False)
    pd.testing.assert_series_equal(
        frame.mean_path_gradient_norm, estimated(chain, inputs, targets, num_draws=1000).mean_path_gradient_norm
    )
    frame = estimated(chain, loader, num_draws=30, progress=False, generator=generator_of(2))
    norms = norms_by_length(path_gradients(chain, inputs, targets))
    error = abs(frame.mean_path_gradient_norm - [v.mean() for v in norms.values()])
    assert (error <= 4 * frame.mean_path_gradient_norm_se + 1e-12).all()


def test_the_generator_alone_decides(mixed):
    first, again, other = (estimated(mixed[0], *batch(), generator=generator_of(seed)) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


def test_few_effective_paths_are_warned_of(mixed):
    with pytest.warns(UserWarning, match=r"At path lengths \[.*effective sample size is below 10"):
        estimated(mixed[0], *batch(), num_draws=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": "uniform"}, r"paths: got 'uniform'; allowed: 'weighted' or 'signs' for method='energy'"),
        ({"method": "sampled", "paths": "signs"}, r"allowed: 'weighted' or 'uniform' for method='sampled'"),
        ({"method": "sampled", "paths": "weighted", "average": "log-mean"}, r"allowed: 'uniform' for .*'log-mean'"),
        ({"method": "exact", "paths": "weighted"}, r"paths: got 'weighted'; allowed: None for method='exact'"),
    ],
)
def test_what_is_refused(mixed, options, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        estimated(mixed[0], *batch(), **options)


# The errors that are stated


def random_recipe(rng, most=10):
    """Blocks of every kind with up to a few thousand paths."""
    kinds = ["one", "one", "one", "scaled", 2, (Recipe(2, "identity"), Recipe(2, "identity"))]
    return tuple(
        Recipe(
            int(rng.integers(1, 4)),
            str(rng.choice(["identity", "identity", "identity", "projection"])),
            kinds[rng.integers(len(kinds))] if index < 3 else "one",
            pre=bool(rng.integers(2)),
            post=bool(rng.integers(2)),
        )
        for index in range(int(rng.integers(7, most + 1)))
    )


def simulated(seed, draws, repeats):
    """Relative errors, stated ones and hits of intervals, at lengths with more paths than twice the draws."""
    chain, rng = build(random_recipe(np.random.default_rng(seed)), seed=seed), np.random.default_rng(seed)
    (point,) = Place.of(chain, "input").points(*batch(), None, 2**31, 1)
    proposal = Proposal.of(chain.path_choices, [point.gains()])
    paths = list(enumerate_paths(chain))
    norms = point.norms(point.of_paths(paths))[0][:, 0]
    lengths = np.array(list(map(path_length, paths)))
    for k in set(lengths.tolist()):
        rows = np.flatnonzero(lengths == k)
        if len(rows) < 2 * draws:
            continue
        logs = np.array([proposal.log_probability(paths[row], k) for row in rows])
        chosen = rng.choice(len(rows), (repeats, draws), p=np.exp(logs) / np.exp(logs).sum())
        weights = np.exp(-math.log(len(rows)) - logs)
        for power in (1, 2):
            truth = (norms[rows] ** power).mean()
            yield [
                ((mean.value - truth) / truth, mean.se / truth, mean.low <= truth <= mean.high)
                for some in chosen
                for mean in [mean_of([WeightedNorms(weights[some], norms[rows[some]], False)], power, 1.0)]
            ]


def check_errors(seeds, draws, repeats):
    found = [of_length for seed in seeds for of_length in simulated(seed, draws, repeats)]
    errors, stated, hits = np.moveaxis(np.array(found, dtype=float), 2, 0)
    assert errors.size >= 1000
    ratio = np.sqrt((errors**2).mean(1)) / np.sqrt((stated**2).mean(1))
    assert 1 / 1.2 < np.sqrt((errors**2).mean()) / np.sqrt((stated**2).mean()) < 1.2
    assert 1 / 1.2 < np.median(ratio) < 1.2
    assert hits.mean() > 0.9


def test_stated_errors_are_right():
    check_errors([3, 5], 100, 100)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:At path lengths")
@pytest.mark.parametrize(
    ("options", "num_chains", "least_drawn"),
    [({"num_draws": 64}, 200, 800), ({"per_example": False}, 60, 40)],
    ids=["populations of 64 paths", "the same paths for all examples"],
)
def test_estimates_of_random_chains_are_within_four_standard_errors(options, num_chains, least_drawn):
    """In all but 1 of 1,000, at the lengths that hold a thousandth.

    With a number of draws no length is exact but those that have no more paths. At the default settings nearly all are.
    """
    far, drawn = [], 0
    for seed in range(num_chains):
        chain = build(random_recipe(np.random.default_rng(seed)), seed=seed)
        (point,) = Place.of(chain, "input").points(*batch(), None, 2**31, 1)
        paths = list(enumerate_paths(chain))
        norms = point.norms(point.of_paths(paths))[0][:, 0]
        if not options.get("per_example", True):
            norms = np.sqrt((norms**2).sum(1, keepdims=True)) / 3
        lengths = np.array(list(map(path_length, paths)))
        frame = estimated(
            chain, *batch(), **{"method": "sampled", "num_draws": None} | options, generator=generator_of(seed)
        )
        for name, power in (("mean", 1), ("rms", 2)):
            truth = np.array([(norms[lengths == k] ** power).mean() ** (1 / power) for k in frame.path_length])
            found, error = (frame[f"{name}_path_gradient_norm{suffix}"] for suffix in ("", "_se"))
            totals = truth**power * frame.num_paths.astype(float)
            held = totals >= totals.sum() / 1000
            far += (abs(found - truth) > 4 * error + 1e-9 * truth)[held].tolist()
            drawn += (error > 1e-9 * truth)[held].sum()
    assert len(far) > 11.5 * num_chains
    assert drawn > least_drawn
    assert np.mean(far) <= 0.001

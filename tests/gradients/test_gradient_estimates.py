"""Estimates over single paths: energies by random signs, norms by sampling; and the errors that they state."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.parts import LinearCombination
from resnet_paths.core.paths import path_length
from resnet_paths.gradients.points import Place, Point
from tests.chains import assert_same, snapshot
from tests.gradients.gradient_reference import (
    Recipe,
    assert_close,
    batch,
    build,
    cross_entropy,
    energies,
    path_gradients,
    recipes,
    seeded,
    summed,
)

gradients_of = rp.gradient_by_path_length
SMALL = (
    Recipe(3, "identity"),
    Recipe(3, "identity", 2, post=True),
    Recipe(2, "projection"),
    Recipe(2, "none"),
    Recipe(2, "identity", (Recipe(2, "identity"), Recipe(2, "identity"))),
    Recipe(2, "identity"),
)
CALIBRATED = (
    Recipe(3, "identity"),
    Recipe(3, "identity", 2, post=True),
    Recipe(2, "projection"),
    Recipe(2, "identity"),
)
KINDS = st.booleans().flatmap(lambda pairs: st.tuples(st.just(pairs), recipes(8, of_pairs=pairs)))


def norms_by_length(gradients):
    """For each length the norms of its paths' gradients, [path, batch]."""
    groups = {}
    for path, vector in gradients.items():
        groups.setdefault(path_length(path), []).append(vector.norm(dim=1))
    return {k: torch.stack(groups[k]) for k in sorted(groups)}


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def num_signs(chain):
    """Branches that take a sign of their own."""
    total = 0
    for block in chain:
        for branch in block.branches:
            total += 1 + (num_signs(branch) if isinstance(branch, ResidualChain) else 0)
    return total


@settings(max_examples=40, deadline=None, derandomize=True)
@given(KINDS.filter(lambda kind: num_signs(build(kind[1], of_pairs=kind[0])) <= 9))
def test_the_mean_over_all_signs_is_the_sum_over_paths_of_squared_norms(kind):
    """Parseval's identity, without any chance: every combination of signs once."""
    of_pairs, recipe = kind
    chain = build(recipe, of_pairs=of_pairs)
    expected = path_gradients(chain, *batch())
    count = num_signs(chain)
    columns = [1 - 2 * (torch.arange(2**count) // 2**i % 2) for i in range(count)]
    signs = iter(columns)
    (point,) = Place.of(chain, "input").points(*batch(), None, 2**31, 1)
    stack = point.by_length(max(map(path_length, expected)), 2**count, lambda: next(signs)[:, None].expand(-1, 3))
    assert next(signs, None) is None
    found = (point.norms(stack)[0] ** 2).mean(1)
    of_lengths = energies(expected)
    assert_close(found[[k - stack.shortest for k in norms_by_length(expected)]], of_lengths)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(KINDS)
def test_energies_of_random_chains(kind):
    of_pairs, recipe = kind
    chain = build(recipe, of_pairs=of_pairs)
    expected = path_gradients(chain, *batch())
    frame = gradients_of(chain, *batch(), method="energy", paths="signs", num_draws=100, generator=generator_of(1))
    exact = gradients_of(chain, *batch())
    pd.testing.assert_frame_equal(frame[exact.columns], exact)
    counts = Counter(map(path_length, expected))
    energy = energies(expected)
    rms = (energy.mean(1) / torch.tensor([counts[k] for k in sorted(counts)])).sqrt().numpy()
    # The estimate is unbiased for the square, whose error is twice the root times the root's.
    error = 2 * frame.rms_path_gradient_norm * frame.rms_path_gradient_norm_se
    assert (abs(frame.rms_path_gradient_norm**2 - rms**2) <= 4 * error + 1e-9 * rms.max() ** 2).all()
    summed_squares = torch.stack(list(summed(expected).values())).square().sum(2)
    coherence = (summed_squares.mean(1) / energy.mean(1)).sqrt().numpy()
    error = 2 * frame.coherence**-3 * frame.coherence_se
    assert (abs(frame.coherence**-2 - coherence**-2) <= 4 * error + 1e-9 * coherence**-2).all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(KINDS)
def test_sampled_norms_of_random_chains(kind):
    of_pairs, recipe = kind
    chain = build(recipe, of_pairs=of_pairs)
    expected = norms_by_length(path_gradients(chain, *batch()))
    for average in ("mean", "log-mean"):
        frame = gradients_of(
            chain, *batch(), method="sampled", paths="uniform", num_draws=64, average=average, generator=generator_of(1)
        )
        logs = average == "log-mean"
        values = [norms.log() if logs else norms for norms in expected.values()]
        mean = np.array([v.mean().exp() if logs else v.mean() for v in values])
        # Where a few of many paths hold most, few draws know their own error badly: enumeration knows it.
        true = [v.mean(1).std(correction=0) / 8 for v in values] * (mean if logs else 1)
        error = np.maximum(frame.mean_path_gradient_norm_se, true)
        assert (abs(frame.mean_path_gradient_norm - mean) <= 4 * error + 1e-9 * mean).all()
        counts = frame.num_paths.astype(float)
        assert_close(frame.total_gradient_magnitude, frame.mean_path_gradient_norm * counts)
        assert_close(frame.total_gradient_magnitude_se, frame.mean_path_gradient_norm_se * counts)


REPEATS = 100
OPTIONS = {
    "energy": {"method": "energy", "paths": "signs", "num_draws": 24},
    "sampled": {"method": "sampled", "paths": "uniform", "num_draws": 12},
    "log-mean": {"method": "sampled", "paths": "uniform", "num_draws": 12, "average": "log-mean"},
    "energy, batch": {"method": "energy", "paths": "signs", "num_draws": 24, "per_example": False},
    "sampled, batch": {"method": "sampled", "paths": "uniform", "num_draws": 12, "per_example": False},
}


def check_errors(frames, suffix, rows):
    """The stated errors are right to a factor of 1.3: their root mean square, and the spread over repeats."""
    estimated = ("rms_path_gradient_norm", "coherence", "mean_path_gradient_norm", "total_gradient_magnitude")
    for name in frames[0].columns.intersection(estimated):
        estimates, errors = (np.array([f[c][rows] for f in frames]) for c in (name, f"{name}{suffix}"))
        spread, stated = estimates.std(0, ddof=1), np.sqrt((errors**2).mean(0))
        known = spread < 1e-12 * estimates.mean(0)  # the coherence of a path alone
        assert (stated[known] < 1e-12 * estimates.mean(0)[known]).all()
        ratio = spread[~known] / stated[~known]
        assert ((ratio > 1 / 1.3) & (ratio < 1.3)).all(), (name, ratio)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_errors_due_to_the_draws(options):
    chain = build(CALIBRATED)
    frames = [gradients_of(chain, *batch(4), generator=generator_of(seed), **options) for seed in range(REPEATS)]
    several = [k for k, count in enumerate(frames[0].num_paths) if count > 1]
    assert len(several) >= 3
    check_errors(frames, "_se", several)
    for frame in frames:  # one path alone has no error
        for k in set(range(len(frame))) - set(several):
            names = [n for n in frame.columns if n.startswith(("rms", "mean")) and n.endswith("norm_se")]
            assert frame[names].to_numpy()[k] == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [OPTIONS["energy"], OPTIONS["sampled"], OPTIONS["log-mean"]], ids=["energy", "sampled", "log-mean"]
)
def test_errors_due_to_draws_and_examples(options):
    chain = build(CALIBRATED)
    frames = [
        gradients_of(chain, *batch(16, 100 + seed), generator=generator_of(seed), **options) for seed in range(REPEATS)
    ]
    check_errors(frames, "_examples_se", list(range(len(frames[0]))))


@pytest.mark.slow
def test_errors_over_the_batches_of_a_loader():
    chain = build(CALIBRATED)
    inputs, targets = batch(6)
    loader = [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]
    for options in (OPTIONS["energy"] | {"num_draws": 8}, OPTIONS["sampled"]):
        frames = [
            gradients_of(chain, loader, generator=generator_of(seed), progress=False, **options)
            for seed in range(REPEATS)
        ]
        check_errors(frames, "_se", [k for k, count in enumerate(frames[0].num_paths) if count > 1])
        power, name = (2, "rms_path_gradient_norm") if options["method"] == "energy" else (1, "mean_path_gradient_norm")
        # An example counts as much as any other, whatever the size of its batch.
        expected = [float((v**power).mean()) for v in norms_by_length(path_gradients(chain, inputs, targets)).values()]
        found, error = (np.array([f[column] for f in frames]) for column in (name, f"{name}_se"))
        tolerance = 4 * power * (found ** (power - 1) * error).max(0) / math.sqrt(REPEATS)
        assert (abs((found**power).mean(0) - expected) <= tolerance + 1e-12).all()


def test_the_batch_as_one_measurement():
    chain = build(SMALL)
    inputs, targets = batch(5)
    expected = path_gradients(chain, inputs, targets)
    options = {"num_draws": 100, "per_example": False}
    frame = gradients_of(chain, inputs, targets, method="energy", paths="signs", **options)
    rms = np.sqrt([float((v**2).sum(1).mean()) / 25 for v in norms_by_length(expected).values()])
    assert (abs(frame.rms_path_gradient_norm - rms) <= 4 * frame.rms_path_gradient_norm_se + 1e-12).all()
    frame = gradients_of(chain, inputs, targets, method="sampled", paths="uniform", **options)
    mean = [float((v**2).sum(1).sqrt().mean()) / 5 for v in norms_by_length(expected).values()]
    assert (abs(frame.mean_path_gradient_norm - mean) <= 4 * frame.mean_path_gradient_norm_se + 1e-12).all()
    assert frame.mean_path_gradient_norm_examples_se.isna().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_agrees_roughly(dtype, tolerance):
    chain = build((
        Recipe(3, "identity", pre=True),
        Recipe(2, "projection", 2, post=True),
        Recipe(2, "concat"),
        Recipe(4, "identity", (Recipe(2, "identity", post=True),)),
        Recipe(3, "identity", "scaled"),
    ))
    names = {
        "exact": "summed_path_gradient_norm",
        "energy": "rms_path_gradient_norm",
        "sampled": "mean_path_gradient_norm",
    }
    inputs, targets = batch()
    frames = [
        [gradients_of(chain.to(d), inputs.to(d), targets, method=method, num_draws=10) for method in names]
        for d in (torch.float64, dtype)
    ]
    for name, one, other in zip(names.values(), *frames, strict=True):
        np.testing.assert_allclose(other[name], one[name], rtol=tolerance)
    np.testing.assert_allclose(frames[1][0].gradient_share, frames[0][0].gradient_share, atol=tolerance)


def test_small_gradients_of_a_batch_as_one_measurement():
    chain = build((Recipe(3, "identity"),) * 3)
    ordinary, small = (
        gradients_of(chain, *batch(), per_example=False, loss=lambda z, t, s=scale: cross_entropy(z, t) * s)
        for scale in (1.0, 1e-200)
    )
    assert_close(small.gradient_share, ordinary.gradient_share)
    assert_close(small.summed_path_gradient_norm * 1e200, ordinary.summed_path_gradient_norm)


@pytest.mark.parametrize("place", ["stem", 1, ("parameters", 2)])
def test_estimates_at_other_places(place):
    chain = build(SMALL)
    expected = norms_by_length(path_gradients(chain, *batch(), place))
    options = {"with_respect_to": place, "num_draws": 150, "generator": generator_of(1)}
    frame = gradients_of(chain, *batch(), method="energy", paths="signs", **options)
    rms = np.array([float((v**2).mean().sqrt()) for v in expected.values()])
    assert (abs(frame.rms_path_gradient_norm - rms) <= 4 * frame.rms_path_gradient_norm_se + 1e-9 * rms).all()
    frame = gradients_of(chain, *batch(), method="sampled", paths="uniform", **options)
    mean = np.array([float(v.mean()) for v in expected.values()])
    assert (abs(frame.mean_path_gradient_norm - mean) <= 4 * frame.mean_path_gradient_norm_se + 1e-9 * mean).all()
    assert frame.attrs["omitted_share"] is None


def test_signs_are_drawn_until_the_error_is_reached():
    chain = build(SMALL)
    draws = []
    for wanted in (0.2, 0.1, 0.04):
        frame = gradients_of(chain, *batch(), method="energy", paths="signs", relative_error=wanted)
        energy = frame.rms_path_gradient_norm**2 * frame.num_paths.astype(float)
        error = frame.rms_path_gradient_norm_se / frame.rms_path_gradient_norm
        assert (error[energy >= energy.sum() / 1000] <= wanted).all()
        draws.append(frame.attrs["num_draws"])
    assert 8 < draws[0] < draws[1] < draws[2] < 1000
    default = gradients_of(chain, *batch(), method="energy", paths="signs")
    assert default.attrs["num_draws"] == draws[1]
    # An error that cannot be reached ends at a thousand draws.
    assert gradients_of(chain, *batch(), method="energy", paths="signs", relative_error=1e-4).attrs["num_draws"] == 1000


@pytest.mark.parametrize("num_draws", [2, 8, 13])
def test_as_many_draws_as_asked_for(num_draws, monkeypatch):
    chain = build(SMALL)
    counted = Counter()
    by_length, of_paths = Point.by_length, Point.of_paths

    def counting_draws(self, longest, num_draws=1, draw_signs=None):
        counted["draws"] += num_draws if draw_signs else 0
        return by_length(self, longest, num_draws, draw_signs)

    def counting_paths(self, paths):
        counted.update(map(path_length, paths))
        return of_paths(self, paths)

    monkeypatch.setattr(Point, "by_length", counting_draws)
    monkeypatch.setattr(Point, "of_paths", counting_paths)
    frame = gradients_of(chain, *batch(), method="energy", paths="signs", num_draws=num_draws)
    assert counted == {"draws": num_draws}
    vjps = gradients_of(chain, *batch()).attrs["num_block_vjps"]
    assert (frame.attrs["num_draws"], frame.attrs["num_block_vjps"]) == (num_draws, vjps * (1 + num_draws))
    counted.clear()
    frame = gradients_of(chain, *batch(), method="sampled", paths="uniform", num_draws=num_draws)
    assert counted == dict.fromkeys(frame.path_length, num_draws)
    assert frame.attrs["num_draws"] == num_draws
    assert frame.attrs["num_block_vjps"] == num_draws * sum(frame.path_length)


def test_twenty_paths_unless_told_otherwise():
    assert gradients_of(build(SMALL), *batch(), method="sampled", paths="uniform").attrs["num_draws"] == 20


@pytest.mark.parametrize(
    "options",
    [{"method": "energy", "paths": "signs"}, {"method": "sampled", "paths": "uniform"}],
    ids=["energy", "sampled"],
)
def test_the_generator_alone_decides(options):
    chain = build(SMALL)
    before = torch.random.get_rng_state()
    default, first, again, other = (
        gradients_of(chain, *batch(), generator=g, **options)
        for g in (None, generator_of(0), generator_of(0), generator_of(1))
    )
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(first, default)
    assert not first.equals(other)
    assert torch.equal(before, torch.random.get_rng_state())
    # It moves on: a second call with the same generator draws others.
    generator = generator_of(0)
    assert not gradients_of(chain, *batch(), generator=generator, **options).equals(
        gradients_of(chain, *batch(), generator=generator, **options)
    )


def test_a_small_memory_leaves_sampled_paths_as_they_are():
    chain = build(SMALL)
    whole, split = (
        gradients_of(chain, *batch(5), method="sampled", paths="uniform", memory_budget=budget) for budget in (2**31, 1)
    )
    for name in whole.columns[2:-1]:
        assert_close(split[name], whole[name])
    split = gradients_of(chain, *batch(5), method="energy", paths="signs", memory_budget=1, num_draws=100)
    rms = [float((v**2).mean().sqrt()) for v in norms_by_length(path_gradients(chain, *batch(5))).values()]
    assert (abs(split.rms_path_gradient_norm - rms) <= 4 * split.rms_path_gradient_norm_se + 1e-12).all()


@pytest.mark.parametrize("method", ["energy", "sampled"])
def test_a_limit_to_the_length(method):
    chain = build(SMALL)
    frame = gradients_of(chain, *batch(), method=method, max_length=3, num_draws=100)
    assert frame.path_length.tolist() == [1, 2, 3]
    expected = norms_by_length(path_gradients(chain, *batch()))
    power, name = (2, "rms_path_gradient_norm") if method == "energy" else (1, "mean_path_gradient_norm")
    for k, found, error in zip(frame.path_length, frame[name], frame[f"{name}_se"], strict=True):
        assert abs(found - float((expected[k] ** power).mean()) ** (1 / power)) <= 4 * error + 1e-12


def test_coherence_of_paths_that_are_all_alike():
    """The coherence is then the root of their number, and every path that is sampled has the mean norm."""
    blocks = [
        rp.Block(LinearCombination([torch.nn.Identity()], [0.5]), torch.nn.Identity(), name=f"{i}") for i in range(5)
    ]
    with seeded():
        chain = ResidualChain(torch.nn.Linear(5, 3), blocks, torch.nn.Linear(3, 3)).double().eval()
    frame = gradients_of(chain, *batch(), method="energy", paths="signs", num_draws=400)
    roots = [math.sqrt(math.comb(5, k)) for k in range(6)]
    assert (abs(frame.coherence - roots) <= 4 * frame.coherence_se + 1e-9).all()
    sampled = gradients_of(chain, *batch(), method="sampled", paths="uniform")
    assert sampled.mean_path_gradient_norm_se.max() < 1e-12 * sampled.mean_path_gradient_norm.max()
    assert_close(sampled.total_gradient_magnitude, frame.summed_path_gradient_norm)


# Nothing changes, and what is refused


INSTRUMENTS = {
    "exact": gradients_of,
    "energy": functools.partial(gradients_of, method="energy", paths="signs", num_draws=3),
    "sampled": functools.partial(gradients_of, method="sampled", paths="uniform"),
    "weighted": functools.partial(gradients_of, method="energy", num_draws=3),
    "parameters": functools.partial(gradients_of, with_respect_to=("parameters", 1)),
    "by stage": rp.gradient_by_stage_lengths,
    "through blocks": rp.gradient_through_block,
}


@pytest.mark.parametrize("instrument", INSTRUMENTS.values(), ids=INSTRUMENTS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_chain_or_the_inputs_changes(instrument, fails):
    chain = build((*SMALL, Recipe(2, "identity", copies=2)))
    chain[1].branch[0].train()  # a mode that is not the same everywhere must survive too
    chain[2].branch[0].weight.requires_grad_(False)
    chain[0].branch[0].bias.grad = torch.ones(4, dtype=torch.float64)
    chain[0].register_forward_hook(lambda *_: None)
    before, global_state = snapshot(chain), torch.random.get_rng_state()
    inputs, targets = batch()
    inputs.requires_grad_()

    def loss(logits, targets):
        if fails:
            raise ZeroDivisionError
        return cross_entropy(logits, targets)

    named = pytest.raises(rp.ResnetPathsError, match=r"loss: .*It raised ZeroDivisionError")
    with named if fails else contextlib.nullcontext() as caught:
        instrument(chain, inputs, targets, loss=loss)
    assert caught is None or isinstance(caught.value.__cause__, ZeroDivisionError)
    assert_same(before, snapshot(chain))
    assert torch.equal(chain[0].branch[0].bias.grad, torch.ones(4, dtype=torch.float64))
    assert (inputs.grad, inputs.requires_grad) == (None, True)
    assert torch.equal(inputs, batch()[0])
    assert torch.equal(targets, batch()[1])
    assert torch.is_grad_enabled()
    assert torch.equal(global_state, torch.random.get_rng_state())


@pytest.mark.parametrize("instrument", INSTRUMENTS.values(), ids=INSTRUMENTS)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(instrument, off):
    chain = build(SMALL)
    with off():
        frame = instrument(chain, *batch())
        assert not torch.is_grad_enabled()
    pd.testing.assert_frame_equal(frame, instrument(chain, *batch()))


def residual(num_blocks=3):
    return build((Recipe(3, "identity"),) * num_blocks)


def with_batch_norm(**options):
    norm = torch.nn.BatchNorm1d(3, **options)
    blocks = [rp.Block(torch.nn.Sequential(torch.nn.Linear(3, 3), norm), torch.nn.Identity(), name="a")]
    return ResidualChain(torch.nn.Linear(5, 3), blocks, torch.nn.Linear(3, 3)).double()


def overflowing():
    chain = residual()
    torch.nn.init.constant_(chain[1].branch[2].bias, float("inf"))
    return chain


REFUSED = [
    (lambda f, x, y: f(with_batch_norm(), x, y), r"chain: got .BatchNorm1d 'blocks.0.branch.1' in training mode.*eval"),
    (lambda f, x, y: f(torch.nn.Linear(5, 3), x, y), r"chain: got 'Linear'; allowed: a ResidualChain.*unravel"),
    (lambda f, x, y: f(residual(), x.long(), y), r"with_respect_to: .*torch.int64 have no gradient.*'stem'"),
    (
        lambda f, x, y: f(residual(), x, y, loss=torch.nn.functional.cross_entropy),
        r"loss: got \[\]; allowed: one number per example, a tensor of shape \[3\].*reduction='none'",
    ),
    (lambda f, x, y: f(residual(), x, loss=lambda z, _: z), r"loss: got \[3, 3\]"),
    (lambda f, x, y: f(residual(), x, loss=lambda z, _: 1.0), r"loss: got 'float'"),
    (lambda f, x, y: f(residual(), x, loss=lambda z, _: z[:, 0] / 0), r"loss: got 'NaN or infinity'"),
    (lambda f, x, y: f(overflowing(), x, y), r"inputs: got .NaN or infinity in the output of block .*block1"),
    (lambda f, x, y: f(residual(), x / 0, y), r"inputs: got 'NaN or infinity in the output of the stem'.*float32"),
    (lambda f, x, y: f(residual(), x, y, with_respect_to="block7"), r"block: got 'block7'; .*nearest 'block"),
    (lambda f, x, y: f(residual(), x, y, with_respect_to=3), r"block: got 3; allowed: a position from -3 to 2"),
    (lambda f, x, y: f(residual(), x, y, with_respect_to=("weights", 1)), r"with_respect_to: got \('weights', 1\)"),
    (lambda f, x, y: f(residual(), x[:0], y[:0]), r"inputs: got .no examples.; allowed: at least one example"),
    (lambda f, x, y: f(residual(), [], progress=False), r"inputs: got 'list'; .*a loader with a batch"),
    (lambda f, x, y: f(residual(), [[x]], progress=False), r"inputs: got 'list'; .*batches of \(inputs, targets\)"),
    (lambda f, x, y: f(residual(), [(x, y)], y, progress=False), r"targets: got 'Tensor'; allowed: None where inputs"),
    (lambda f, x, y: f(residual(), x), r"targets: got 'NoneType'; allowed: class indices \[batch\]"),
    (lambda f, x, y: f(residual(), x, y[:2]), r"targets: got 'torch.int64 \[2\]'.*It answered: "),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_every_instrument_refuses(call, message):
    for instrument in (gradients_of, rp.gradient_by_stage_lengths, rp.gradient_through_block):
        with pytest.raises(rp.ResnetPathsError, match=message):
            call(instrument, *batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 4}, r"max_length: got 4; allowed: an int from 0 to 3"),
        ({"max_length": -1}, r"max_length: got -1"),
        ({"max_length": 1.5}, r"max_length: got 1.5"),
        ({"method": "enrgy"}, r"method: got 'enrgy'; allowed: one of 'energy'"),
        ({"method": "exact", "average": "median"}, r"average: got 'median'; allowed: 'mean' or 'log-mean'"),
        ({"num_draws": 1}, r"num_draws: got 1; allowed: an int of at least 2"),
        ({"num_draws": 2.5}, r"num_draws: got 2.5"),
        ({"relative_error": 0}, r"relative_error: got 0; allowed: a number between 0 and 1"),
        ({"relative_error": 1.0}, r"relative_error: got 1.0"),
        ({"relative_error": float("nan")}, r"relative_error: got nan"),
        ({"with_respect_to": ("parameters", 9)}, r"block: got 9"),
        ({"with_respect_to": ("parameters", 1), "per_example": False}, r"per_example: got False; allowed: True for"),
    ],
)
def test_what_is_refused_by_path_length(options, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        gradients_of(residual(), *batch(), **options)


def test_other_refusals():
    plain = build((Recipe(3, "none"), Recipe(3, "identity")))
    with pytest.raises(rp.ResnetPathsError, match=r"max_length: got 0; allowed: an int from 1 to 2"):
        gradients_of(plain, *batch(), max_length=0)
    with pytest.raises(rp.ResnetPathsError, match=r"with_respect_to: .*a block that has parameters"):
        gradients_of(rp.delete_block(residual(), 1), *batch(), with_respect_to=("parameters", 1))
    for instrument in (rp.gradient_by_stage_lengths, rp.gradient_through_block):
        with pytest.raises(rp.ResnetPathsError, match=r"with_respect_to: got .*'input', 'stem' or a block"):
            instrument(residual(), *batch(), with_respect_to=("parameters", 1))


def test_an_empty_tuple_is_refused():
    with pytest.raises(rp.ResnetPathsError, match="inputs"):
        gradients_of(residual(), ())


def test_batch_norm_without_statistics_is_refused():
    with pytest.raises(rp.ResnetPathsError, match="BatchNorm1d"):
        gradients_of(with_batch_norm(track_running_stats=False).eval(), *batch())


def test_numpy_integers_are_integers():
    limited = gradients_of(residual(), *batch(), max_length=np.int64(2))
    assert limited.path_length.tolist() == [0, 1, 2]

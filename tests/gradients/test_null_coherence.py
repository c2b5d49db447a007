"""Coherence of a null, against the gradients of all paths with Jacobians of other examples or all sign patterns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import resnet_paths as rp
from resnet_paths.gradients import null_coherence
from resnet_paths.gradients.coherence import drawn_examples
from tests.gradients.gradient_reference import (
    Recipe,
    batch,
    build,
    cross_entropy,
    energies,
    flat,
    jacobian,
    path_gradients,
    sides,
    summed,
)
from tests.gradients.test_context import batch as batch_with_context
from tests.gradients.test_context import chain_of
from tests.gradients.test_weighted_paths import MIXED

PLAIN = (
    Recipe(3, "identity", post=True),
    Recipe(4, "projection", 2, pre=True),
    Recipe(4, "identity", deleted=True),
    Recipe(4, "identity", "scaled"),
)
OTHERS = batch(4, seed=9)[0]


def states_of(chain, inputs):
    states = [chain.stem(inputs)]
    for block in chain:
        states.append(block(states[-1]))
    return [state.detach() for state in states]


def with_jacobians_at(chain, inputs, targets, others, chosen, place="input"):
    """Every path's gradient, block i of example e linearized at the state of example ``chosen[i][e]`` of others."""
    below = 0 if place in ("input", "stem") else place + 1
    beside, last = states_of(chain, others), states_of(chain, inputs)[-1].requires_grad_()
    vectors = torch.autograd.grad(cross_entropy(chain.head(last), targets).sum(), last)[0][None]
    paths = [()]
    for index in reversed(range(below, len(chain))):
        taken = sides(chain[index], beside[index][torch.as_tensor(chosen[index - below])])[1]
        vectors = torch.cat([torch.einsum("pbo,boi->pbi", vectors, m) for m in taken.values()])
        paths = [(entry, *path) for entry in taken for path in paths]
    if place == "input":
        vectors = torch.einsum("pbo,boi->pbi", vectors, jacobian(chain.stem, inputs)[1])
    return dict(zip(paths, vectors, strict=True))


def squares_and_energies(gradients):
    """For each length the means over examples of the squared norm of the sum, and of the sum of squared norms."""
    sums = torch.stack([flat(v).square().sum(1) for v in summed(gradients).values()])
    return sums.mean(1).numpy(), energies(gradients).mean(1).numpy()


def coherence_of(gradients):
    squares, of_paths = squares_and_energies(gradients)
    return np.sqrt(squares / of_paths)


@pytest.mark.parametrize("recipe", [PLAIN, MIXED], ids=["plain", "nested"])
@pytest.mark.parametrize("place", ["input", "stem", 0])
def test_all_blocks_at_one_other_example(recipe, place):
    chain, data = build(recipe), batch()
    frame = null_coherence(chain, *data, others=OTHERS[:1], with_respect_to=place, num_repeats=2, num_draws=2000)
    above = len(chain) - (0 if isinstance(place, str) else place + 1)
    expected = coherence_of(with_jacobians_at(chain, *data, OTHERS[:1], [[0, 0, 0]] * above, place))
    own = coherence_of(path_gradients(chain, *data, place))
    np.testing.assert_allclose(frame.coherence, own, rtol=1e-10)
    np.testing.assert_allclose(frame.null_coherence, expected, rtol=1e-10)
    np.testing.assert_allclose(frame.null_coherence_se, 0, atol=1e-10)
    several = frame.num_paths.to_numpy() > 1
    kept = (expected[several] ** 2 - 1) / (own[several] ** 2 - 1)
    np.testing.assert_allclose(frame.kept_share[several], kept, rtol=1e-8)
    assert frame.kept_share[~several].isna().all()


def test_each_block_has_its_own_example():
    chain, data = build(PLAIN), batch()
    expected = [
        squares_and_energies(with_jacobians_at(chain, *data, OTHERS, one))
        for one in _drawn(len(chain), 3, len(OTHERS), seed=5, repeats=3)
    ]
    frame = null_coherence(
        chain, *data, others=OTHERS, num_repeats=3, num_draws=2000, generator=torch.Generator().manual_seed(5)
    )
    squares, of_paths = (np.array(values) for values in zip(*expected, strict=True))
    value = np.sqrt(squares.mean(0) / of_paths.mean(0))
    np.testing.assert_allclose(frame.null_coherence, value, rtol=1e-10)
    each = np.sqrt(squares / of_paths)
    np.testing.assert_allclose(frame.null_coherence_low, np.quantile(each, 0.025, axis=0), rtol=1e-10)
    np.testing.assert_allclose(frame.null_coherence_high, np.quantile(each, 0.975, axis=0), rtol=1e-10)
    # The error of a ratio of means, to first order.
    residuals = (squares - value**2 * of_paths) / (2 * value * of_paths.mean(0))
    np.testing.assert_allclose(frame.null_coherence_se, residuals.std(0, ddof=1) / np.sqrt(3), rtol=1e-8, atol=1e-14)


def _drawn(num_blocks, num_examples, num_others, seed, repeats):
    generator = torch.Generator().manual_seed(seed)  # all paths are measured: nothing else is drawn
    return [drawn_examples(num_blocks, num_examples, num_others, generator) for _ in range(repeats)]


@pytest.mark.parametrize("num_blocks", [1, 4, 5, 9])
def test_sources_are_all_different_as_long_as_there_are_enough(num_blocks):
    chosen = drawn_examples(num_blocks, 1000, 4, torch.Generator().manual_seed(0)).numpy()
    assert chosen.shape == (num_blocks, 1000)
    for start in range(0, num_blocks, 4):
        some = np.sort(chosen[start : start + 4], 0)
        assert (np.diff(some, axis=0) > 0).all()
    # Each is as likely as any other, and examples are drawn apart from each other.
    share = np.array([(chosen == one).mean(1) for one in range(4)])
    assert np.abs(share - 1 / 4).max() < 4 * np.sqrt(3 / 16 / 1000)
    assert abs((chosen[:, :-1] == chosen[:, 1:]).mean() - 1 / 4) < 0.06


def test_random_signs_leave_no_coherence():
    chain, data = build(PLAIN), batch()
    vectors = path_gradients(chain, *data)
    # All patterns of signs of the branches, of which block 1 has two.
    branches = sorted({(index, entry) for path in vectors for index, entry in enumerate(path) if entry})
    of_paths = squares_and_energies(vectors)[1]
    means = np.zeros(len(of_paths))
    for signs in itertools.product([1, -1], repeat=len(branches)):
        sign_of = dict(zip(branches, signs, strict=True))
        signed = {
            path: v * np.prod([sign_of[place] for place in enumerate(path) if place[1]]) for path, v in vectors.items()
        }
        means += squares_and_energies(signed)[0] / 2 ** len(branches)
    np.testing.assert_allclose(means, of_paths, rtol=1e-12)
    frame = null_coherence(chain, *data, num_repeats=400, num_draws=2000, generator=torch.Generator().manual_seed(1))
    assert np.all(np.abs(frame.null_coherence - 1) <= 4 * frame.null_coherence_se + 1e-12)
    assert 0 < frame.null_coherence_se.max() < 0.05
    several = frame.num_paths.to_numpy() > 1
    assert np.all(np.abs(frame.kept_share[several]) <= 4 * frame.kept_share_se[several])
    assert (frame.null_coherence_low[several] < 1).all()
    assert (frame.null_coherence_high[several] > 1).all()


def test_estimates_agree_with_all_paths():
    chain, data = build(MIXED), batch()
    exact = null_coherence(chain, *data, others=OTHERS[:1], num_repeats=2, num_draws=2000)
    frame = null_coherence(chain, *data, others=OTHERS[:1], num_repeats=8, num_draws=4, max_length=3)
    exact = exact[exact.path_length <= 3]
    assert frame.path_length.tolist() == exact.path_length.tolist()
    assert (frame.null_coherence_se > 0).any()
    error = np.sqrt(frame.null_coherence_se**2 + (0.02 * exact.null_coherence) ** 2)
    assert np.all(np.abs(frame.null_coherence - exact.null_coherence) <= 4 * error)


def test_a_loader_and_a_small_memory_change_nothing():
    chain, (inputs, targets) = build(PLAIN), batch(5)
    options = {"others": OTHERS[:1], "num_repeats": 2, "num_draws": 2000, "progress": False}
    whole = null_coherence(chain, inputs, targets, **options)
    parts = null_coherence(chain, [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])], **options)
    np.testing.assert_allclose(parts.to_numpy(float), whole.to_numpy(float), rtol=1e-8, atol=1e-10)
    several = options | {"others": OTHERS}
    seeds = [{"generator": torch.Generator().manual_seed(2)} for _ in range(2)]
    roomy = null_coherence(chain, inputs, targets, **several, **seeds[0])
    small = null_coherence(chain, inputs, targets, memory_budget=1, **several, **seeds[1])
    np.testing.assert_allclose(small.to_numpy(float), roomy.to_numpy(float), rtol=1e-8, atol=1e-10)


def test_the_chain_is_as_it_was():
    chain, data = build(PLAIN), batch()
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    outputs = chain(data[0])
    null_coherence(chain, *data, others=OTHERS, num_repeats=2)
    assert torch.equal(chain(data[0]), outputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in chain.state_dict().items())


def test_context_belongs_to_one_example():
    chain, data = chain_of("one after the other"), batch_with_context()
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got .*'gate'.*beside the state.*others=None"):
        null_coherence(chain, *data, others=data[0], with_respect_to="stem")
    frame = null_coherence(chain, *data, with_respect_to="stem", num_repeats=100, num_draws=2000)
    assert np.all(np.abs(frame.null_coherence - 1) <= 4 * frame.null_coherence_se + 1e-12)


def test_others_of_another_size_are_refused():
    chain = rp.ResidualChain(torch.nn.Identity(), [rp.Block(torch.nn.Tanh(), torch.nn.Identity())], torch.nn.Identity())
    inputs = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(rp.ResnetPathsError, match=r"others: got 'states \[4\] at block 0'.*\[3\]"):
        null_coherence(chain.eval(), inputs, others=torch.ones(2, 4), loss=lambda y, _: y.sum(1))


def test_parameters_are_no_place():
    with pytest.raises(rp.ResnetPathsError, match="with_respect_to"):
        null_coherence(build(PLAIN), *batch(), with_respect_to=("parameters", 0))

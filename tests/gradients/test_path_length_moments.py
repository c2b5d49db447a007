"""Moments of path length and shares through blocks, from a fixed number of sweeps, against the whole split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_paths as rp
from resnet_paths.core.backward import cotangents
from resnet_paths.core.backward.linearize import unchanged
from resnet_paths.core.chain import ResidualChain
from tests.gradients.gradient_reference import Recipe, batch, build, recipes

KINDS = st.booleans().flatmap(lambda pairs: st.tuples(st.just(pairs), recipes(6, of_pairs=pairs)))
SMALL = (Recipe(3, "identity"), Recipe(3, "identity", 2), Recipe(2, "projection", (Recipe(2, "identity"),), pre=True))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(KINDS, st.sampled_from(["input", "stem", 0]))
def test_moments_and_shares_of_random_chains(kind, place):
    of_pairs, recipe = kind
    chain = build(recipe, of_pairs=of_pairs)
    options = {"with_respect_to": place, "progress": False}
    split = rp.gradient_by_path_length(chain, *batch(), **options)
    k, share = split.path_length, split.gradient_share
    moments = rp.path_length_moments(chain, *batch(), **options)
    scale = 1 + float((k**2 * share.abs()).sum())
    mean = float((k * share).sum())
    assert moments.mean == pytest.approx(mean, abs=1e-10 * scale)
    assert moments.variance == pytest.approx(float((k**2 * share).sum()) - mean**2, abs=1e-10 * scale * (1 + abs(mean)))
    fast, slow = (rp.gradient_through_block(chain, *batch(), norms=norms, **options) for norms in (False, True))
    assert "path_gradient_norm_through_branch" not in fast
    for name in fast:
        if name.startswith("gradient_share"):
            np.testing.assert_allclose(fast[name], slow[name], rtol=1e-9, atol=1e-10 * scale)


def test_errors_are_over_examples_and_batches_change_nothing():
    chain, (inputs, targets) = build(SMALL), batch(6)
    each = [rp.path_length_moments(chain, inputs[i : i + 1], targets[i : i + 1]) for i in range(6)]
    together = rp.path_length_moments(chain, inputs, targets)
    means = np.array([moments.mean for moments in each])
    assert together.mean == pytest.approx(means.mean())
    assert together.mean_se == pytest.approx(means.std(ddof=1) / np.sqrt(6))
    squares = np.array([m.variance + m.mean**2 - 2 * together.mean * m.mean for m in each])
    assert together.variance == pytest.approx(squares.mean() + together.mean**2)
    assert together.variance_se == pytest.approx(squares.std(ddof=1) / np.sqrt(6))
    assert np.isnan(each[0].mean_se)
    loader = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    split = rp.path_length_moments(chain, loader, progress=False, memory_budget=1)
    assert (split.mean, split.variance_se) == pytest.approx((together.mean, together.variance_se))


class Constant(torch.nn.Module):
    """A branch of fewer dimensions than the state, which the addition broadcasts."""

    def forward(self, state):
        return torch.arange(3.0, dtype=state.dtype)


def test_branches_that_the_addition_broadcasts():
    chain = build(SMALL[:1] * 2)
    chain = chain.with_blocks([chain[0], chain[1].replace(branch=Constant())])
    fast, slow = (rp.gradient_through_block(chain, *batch(), norms=norms) for norms in (False, True))
    np.testing.assert_allclose(fast.gradient_share_through_branch, slow.gradient_share_through_branch, atol=1e-12)


def deep(num_blocks, width):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = []
        for index in range(num_blocks):
            layer = torch.nn.Linear(width, width)
            torch.nn.init.normal_(layer.weight, std=0.3 / width**0.5)
            blocks.append(
                rp.Block(torch.nn.Sequential(layer, torch.nn.Tanh()), torch.nn.Identity(), name=f"block{index}")
            )
        return ResidualChain(torch.nn.Linear(5, width), blocks, torch.nn.Linear(width, 3)).double().eval()


def test_cost_grows_with_the_number_of_blocks_alone(monkeypatch):
    rows = []
    pull = cotangents._pull

    def counting(pullback, values):
        rows.append(len(values) * (pullback is not unchanged))
        return pull(pullback, values)

    monkeypatch.setattr(cotangents, "_pull", counting)
    chain = deep(40, 3)
    split = rp.gradient_by_path_length(chain, *batch(), with_respect_to="stem")
    whole = sum(rows)
    rows.clear()
    moments = rp.path_length_moments(chain, *batch(), with_respect_to="stem")
    assert whole == 40 * 41 / 2 + 40
    assert sum(rows) <= 3 * 40
    assert moments.mean == pytest.approx(float((split.path_length * split.gradient_share).sum()), abs=1e-10)
    rows.clear()
    rp.gradient_through_block(chain, *batch(), with_respect_to="stem")
    assert sum(rows) <= 2 * 40


def test_parameters_are_refused():
    with pytest.raises(rp.ResnetPathsError, match=r"with_respect_to: got .*'input', 'stem' or a block"):
        rp.path_length_moments(build(SMALL), *batch(), with_respect_to=("parameters", 1))

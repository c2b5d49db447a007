"""Moments of path length as the prediction weighs it, from one backward sweep, against the whole split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resnet_paths as rp
from resnet_paths.core.backward import cotangents
from resnet_paths.core.backward.linearize import unchanged
from resnet_paths.core.chain import ResidualChain
from tests.gradients.gradient_reference import Recipe, batch, build, recipes, seeded

moments_of = rp.prediction_path_length_moments
KINDS = st.booleans().flatmap(lambda pairs: st.tuples(st.just(pairs), recipes(6, of_pairs=pairs)))
SMALL = (Recipe(3, "identity"), Recipe(3, "identity", 2), Recipe(2, "projection", (Recipe(2, "identity"),), pre=True))


def assert_moments_of_split(chain, inputs, targets, **options):
    split = rp.prediction_by_path_length(chain, inputs, targets, progress=False, **options)
    moments = moments_of(chain, inputs, targets, progress=False, **options)
    k, share = split.path_length, split.share
    scale = 1 + float((k**2 * split.mean_absolute_contribution).sum() / abs(split.attrs["mean_output"]))
    mean = float((k * share).sum())
    assert moments.mean == pytest.approx(mean, abs=1e-10 * scale)
    assert moments.variance == pytest.approx(float((k**2 * share).sum()) - mean**2, abs=1e-10 * scale * (1 + abs(mean)))
    assert moments.mean_output == pytest.approx(split.attrs["mean_output"], abs=1e-13)
    assert moments.num_examples == split.attrs["num_examples"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(KINDS, st.sampled_from(["margin", "logit", "log_probability"]), st.booleans())
def test_moments_of_random_chains(kind, output, with_targets):
    of_pairs, recipe = kind
    inputs, targets = batch()
    chain = build(recipe, of_pairs=of_pairs)
    assert_moments_of_split(chain, inputs, targets if with_targets else None, output=output)


class Attention(nn.Module):
    """A norm, attention over four positions, and a gate: three operations whose linearizations differ."""

    def __init__(self):
        super().__init__()
        self.norm, self.make, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        query, key, value = self.make(self.norm(x)).chunk(3, -1)
        weights = (query @ key.transpose(1, 2)).softmax(-1)
        return self.out(nn.functional.gelu(weights @ value))


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.norm(x).mean(1))


@pytest.mark.parametrize("linearization", ["tangent", "detached"])
def test_both_linearizations(linearization):
    with seeded(3):
        blocks = [rp.Block(Attention(), nn.Identity(), name=f"block{index}") for index in range(4)]
        chain = ResidualChain(nn.Linear(5, 6), blocks, Mean()).double().eval()
        inputs = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_moments_of_split(chain, inputs, None, linearization=linearization)


def test_means_of_the_linearizations_differ():
    with seeded(3):
        blocks = [rp.Block(Attention(), nn.Identity(), name=f"block{index}") for index in range(4)]
        chain = ResidualChain(nn.Linear(5, 6), blocks, Mean()).double().eval()
        inputs = torch.randn(3, 4, 5, dtype=torch.float64)
    tangent, detached = (moments_of(chain, inputs, linearization=name).mean for name in ("tangent", "detached"))
    assert abs(tangent - detached) > 0.1


def test_a_constant_of_a_branch_has_length_1():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([3.0, 0.0]))
    chain = ResidualChain(nn.Identity(), [rp.Block(layer, nn.Identity(), name="block0")], nn.Identity()).double()
    moments = moments_of(chain.eval(), torch.tensor([[1.0, 0.0]], dtype=torch.float64), output=lambda y: y.sum(1))
    assert moments.mean == pytest.approx(3 / 4)
    assert moments.variance == pytest.approx(3 / 16)


def test_errors_are_those_of_a_ratio_and_batches_change_nothing():
    chain, (inputs, targets) = build(SMALL), batch(40)
    together = moments_of(chain, inputs, targets, output="logit")
    each = [moments_of(chain, inputs[i : i + 1], targets[i : i + 1], output="logit") for i in range(40)]
    outputs = np.array([one.mean_output for one in each])
    means = np.array([one.mean for one in each])
    squares = np.array([one.variance + one.mean**2 for one in each])

    def pooled(weights):
        mean, square = (np.sum(weights * outputs * column) / np.sum(weights * outputs) for column in (means, squares))
        return np.array([mean, square - mean**2])

    whole, step = np.ones(40), 1e-6
    assert pooled(whole) == pytest.approx([together.mean, together.variance])
    # What one example more of a kind adds, by finite differences.
    slopes = np.array([(pooled(whole + step * one) - pooled(whole - step * one)) / (2 * step) for one in np.eye(40)])
    expected = np.sqrt((slopes**2).sum(0) * 40 / 39)
    assert [together.mean_se, together.variance_se] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(each[0].mean_se)
    assert np.isnan(each[0].variance_se)
    loader = [(inputs[:15], targets[:15]), (inputs[15:], targets[15:])]
    split = moments_of(chain, loader, output="logit", progress=False, memory_budget=1)
    assert (split.mean, split.variance_se) == pytest.approx((together.mean, together.variance_se))


def deep(num_blocks, width):
    with seeded(0):
        blocks = []
        for index in range(num_blocks):
            layer = nn.Linear(width, width)
            nn.init.normal_(layer.weight, std=0.3 / width**0.5)
            blocks.append(rp.Block(nn.Sequential(layer, nn.Tanh()), nn.Identity(), name=f"block{index}"))
        return ResidualChain(nn.Linear(5, width), blocks, nn.Linear(width, 3)).double().eval()


def test_cost_grows_with_the_number_of_blocks_alone(monkeypatch):
    rows = []
    pull = cotangents._pull

    def counting(pullback, values):
        rows.append(len(values) * (pullback is not unchanged))
        return pull(pullback, values)

    monkeypatch.setattr(cotangents, "_pull", counting)
    chain, inputs = deep(40, 3), batch()[0]
    split = rp.prediction_by_path_length(chain, inputs, output=lambda y: y[:, 0])
    whole = sum(rows)
    rows.clear()
    moments = moments_of(chain, inputs, output=lambda y: y[:, 0])
    assert whole >= 40 * 41 / 2
    assert sum(rows) <= 3 * 40
    assert moments.mean == pytest.approx(float((split.path_length * split.share).sum()), abs=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "margins"}, "output"),
        ({"output": lambda y: y}, "one number per example"),
        ({"linearization": "secant"}, "linearization"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"targets": torch.tensor([0, 1, 7])}, "class indices from 0 to 2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        moments_of(build(SMALL), batch()[0], **options)


def test_outputs_that_sum_up_to_0_have_no_moments():
    moments = moments_of(build(SMALL), batch()[0], output=lambda y: 0 * y.sum(1))
    assert np.isnan([moments.mean, moments.variance]).all()

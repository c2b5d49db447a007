"""Predictions by path length against products of dense Jacobians along every path from every source."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Placed
from resnet_paths.predictions.shares import checked_residual
from tests.gradients.gradient_reference import Recipe, batch, build, recipes, seeded
from tests.predictions.enumeration import assert_all_equal, enumerated, margin

predictions_of = rp.prediction_by_path_length


@settings(max_examples=200, deadline=None)
@given(blocks=recipes(8, 1), seed=st.integers(0, 2**16))
def test_every_source_and_length_is_the_sum_over_its_paths(blocks, seed):
    assert_all_equal(build(blocks, seed), batch(1, seed)[0])


@pytest.mark.parametrize("of_pairs", [False, True])
def test_packed_states_and_blocks_without_skip(of_pairs):
    blocks = (Recipe(2, "identity"), Recipe(3, "none"), Recipe(2, "projection", post=True), Recipe(2, "none", pre=True))
    assert_all_equal(build(blocks, 3, of_pairs), batch()[0])


class WithContext(nn.Module):
    """A branch that reads a tensor beside the state."""

    reads_context = ("extra",)

    def __init__(self):
        super().__init__()
        self.state, self.extra = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, extra):
        return torch.tanh(self.state(x)) * self.extra(extra)


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.state, self.extra = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.state(x), self.extra(x)


def test_context_is_what_the_stem_makes():
    """The same as a chain whose state holds the context beside it: that is enumerated."""

    class OnBoth(nn.Module):
        def __init__(self, branch, reads):
            super().__init__()
            self.branch, self.reads = branch, reads

        def forward(self, both):
            x, extra = both[:, :3], both[:, 3:]
            added = self.branch(x, extra) if self.reads else self.branch(x)
            return torch.cat([added, torch.zeros_like(extra)], 1)

    with seeded(5):
        branches = [WithContext(), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), WithContext()]
        stem, head = Stem(), nn.Linear(3, 4)
    blocks = [Block(b, nn.Identity(), name=f"block{i}") for i, b in enumerate(branches)]
    chain = ResidualChain(stem, blocks, head, ["extra"]).double().eval()
    both = [
        Block(OnBoth(b, isinstance(b, WithContext)), nn.Identity(), name=f"block{i}") for i, b in enumerate(branches)
    ]

    class Joined(nn.Module):
        def forward(self, x):
            return torch.cat(stem(x), 1)

    class OfState(nn.Module):
        def forward(self, x):
            return head(x[:, :3])

    inputs = batch()[0]
    expected, _ = enumerated(ResidualChain(Joined(), both, OfState()), inputs, lambda y: y[:, 1])
    frame = predictions_of(chain, inputs, output=lambda y: y[:, 1], by_source=True)
    for row in frame.itertuples():
        wanted = expected.get((row.source, row.path_length), torch.zeros(3)).mean().item()
        assert row.contribution == pytest.approx(wanted, abs=1e-12), row


def test_parts_sum_to_their_blocks():
    chain = build((Recipe(2, "projection", pre=True, post=True), Recipe(2, "identity", (Recipe(2, "identity"),))), 1)
    inputs = batch()[0]
    apart = predictions_of(chain, inputs, by_source="parts")
    blocks = predictions_of(chain, inputs, by_source=True)
    summed = apart.groupby(["source", "path_length"]).contribution.sum()
    np.testing.assert_allclose(
        summed[list(zip(blocks.source, blocks.path_length, strict=True))], blocks.contribution, atol=1e-13
    )
    assert set(apart.part.dropna()) == {"pre", "skip", "branch", "post"}


@pytest.mark.parametrize("output", ["margin", "logit", "log_probability"])
@pytest.mark.parametrize("with_targets", [False, True])
def test_outputs(output, with_targets):
    chain = build((Recipe(2, "identity"), Recipe(2, "identity")), 2)
    inputs, targets = batch(5)
    with torch.no_grad():
        logits = chain(inputs)
    chosen = targets if with_targets else logits.argmax(1)
    expected = {
        "margin": margin(logits, chosen),
        "logit": logits.gather(1, chosen[:, None])[:, 0],
        "log_probability": -F.cross_entropy(logits, chosen, reduction="none"),
    }[output]
    frame = predictions_of(chain, inputs, targets if with_targets else None, output=output)
    assert frame.contribution.sum() == pytest.approx(expected.mean().item(), abs=1e-12)
    assert frame.attrs["mean_output"] == pytest.approx(expected.mean().item(), abs=1e-12)
    assert frame.share.sum() == pytest.approx(1)


def test_statistics_are_those_of_the_examples():
    chain, inputs = build((Recipe(3, "identity"),) * 3, 4), batch(20)[0]
    each = [predictions_of(chain, x[None]) for x in inputs]
    values = np.stack([frame.contribution for frame in each], 1)
    outputs = np.array([frame.attrs["mean_output"] for frame in each])
    frame = predictions_of(chain, [(inputs[:8], None), (inputs[8:], None)], memory_budget=2000)
    np.testing.assert_allclose(frame.contribution, values.mean(1), atol=1e-13)
    np.testing.assert_allclose(frame.contribution_se, values.std(1, ddof=1) / math.sqrt(20), atol=1e-13)
    np.testing.assert_allclose(frame.share, values.sum(1) / outputs.sum(), atol=1e-12)
    np.testing.assert_allclose(frame.mean_absolute_contribution, np.abs(values).mean(1), atol=1e-13)
    generator = np.random.default_rng(1)
    picks = generator.integers(20, size=(4000, 20))
    shares = values[:, picks].sum(2) / outputs[picks].sum(1)
    np.testing.assert_allclose(frame.share_low, np.quantile(shares, 0.025, axis=1), atol=0.1 * shares.std())
    np.testing.assert_allclose(frame.share_high, np.quantile(shares, 0.975, axis=1), atol=0.1 * shares.std())
    assert math.isnan(each[0].share_low[0])


def test_max_length_gives_the_same_numbers():
    chain, inputs = build((Recipe(3, "identity"), Recipe(2, "none"), Recipe(2, "identity", 2)), 4), batch()[0]
    whole, short = predictions_of(chain, inputs), predictions_of(chain, inputs, max_length=1)
    np.testing.assert_allclose(short.contribution, whole.contribution[:2], atol=1e-14)
    assert short.attrs["residual"] is None
    assert short.attrs["omitted_share"] == pytest.approx(1 - whole.share[:2].sum())


def test_numbers_of_paths():
    chain, inputs = build((Recipe(2, "identity"), Recipe(2, "none"), Recipe(2, "identity")), 0), batch()[0]
    frame = predictions_of(chain, inputs, by_source=True)
    counts = frame.groupby(["source", "path_length"]).num_paths.sum()
    assert counts["stem"].to_dict() == {1: 1, 2: 2, 3: 1}
    assert counts["block1"].to_dict() == {1: 1, 2: 1}
    assert counts["block2"].to_dict() == {0: 1, 1: 1}
    assert counts["head"].to_dict() == {0: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "margins"}, "output"),
        ({"output": lambda y: y}, "one number per example"),
        ({"output": lambda y: y[:, 0] / 0}, "finite"),
        ({"linearization": "secant"}, "linearization"),
        ({"by_source": "blocks"}, "by_source"),
        ({"max_length": 9}, "max_length"),
        ({"targets": torch.tensor([0, 1, 7])}, "class indices from 0 to 2"),
        ({"targets": torch.rand(3)}, "class indices"),
    ],
)
def test_refusals(options, message):
    chain = build((Recipe(2, "identity"),) * 2)
    with pytest.raises(rp.ResnetPathsError, match=message):
        predictions_of(chain, batch()[0], **options)


def test_states_are_concatenated():
    width = 3
    blocks = []
    with seeded(8):
        for index in range(3):
            added = nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2), Placed(1, width, 0))
            blocks.append(Block(added, Placed(1, 0, 2), name=f"block{index}"))
            width += 2
        chain = ResidualChain(nn.Linear(5, 3), blocks, nn.Linear(width, 3)).double().eval()
    assert_all_equal(chain, batch()[0])


def test_blocks_may_have_the_names_of_stem_and_head():
    chain, inputs = build((Recipe(3, "identity"),) * 3, 4), batch()[0]
    names = ["head", "constants", "stem"]
    renamed = chain.with_blocks([block.replace(name=name) for block, name in zip(chain, names, strict=True)])
    for by_source in (True, "parts"):
        frame, expected = (rp.prediction_by_path_length(each, inputs, by_source=by_source) for each in (renamed, chain))
        pd.testing.assert_frame_equal(frame.drop(columns="source"), expected.drop(columns="source"))
    blocks = frame[frame.block_index.notna()]
    for index, rows in blocks[blocks.part == "branch"].groupby("block_index"):
        # From the input of the block: C(n, k) of n blocks.
        assert dict(zip(rows.path_length, rows.num_paths, strict=True)) == {
            k: math.comb(3 - index, k) for k in range(4 - index)
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_wrong_account_is_refused_in_any_precision(dtype):
    """What is missing is a third of the output; rounding in half precision is about a hundredth."""
    blocks = [Block(nn.Linear(8, 8), nn.Identity(), name=f"block{i}") for i in range(54)]
    chain = ResidualChain(nn.Identity(), blocks, nn.Linear(8, 3)).to(dtype).eval()
    values = np.array([[1.0, -4.0], [2.0, -2.0]])
    assert checked_residual(chain, values.sum(0) * (1 + 1e-3 * (dtype != torch.float32)), values) <= 1e-2
    with pytest.raises(rp.ResnetPathsError, match=r"differ from the output of example 1 by 2'.* rounding explains"):
        checked_residual(chain, np.array([3.0, -4.0]), values)
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert rp.prediction_by_path_length(chain, inputs, max_length=None).attrs["residual"] >= 0

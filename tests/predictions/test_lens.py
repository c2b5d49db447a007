"""Lenses against dense Jacobians along every path, against autograd, and against the head applied to the state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.paths import path_length
from tests.gradients.gradient_reference import Recipe, batch, build, recipes, seeded, sides
from tests.predictions.plain_networks import made
from tests.predictions.test_predictions import Stem, WithContext


def read_by(chain, inputs, **options):
    """The frame of a lens, and the logits of each of its rows."""
    seen = []

    def logits(outputs):
        seen.append(outputs)
        return outputs

    frame = rp.lens(chain, inputs, logits=logits, **options)
    assert len(seen) == 1 + len(frame)
    return frame, seen[1:]


def states_of(chain, inputs):
    states = [chain.stem(inputs).detach()]
    for block in chain:
        states.append(block(states[-1]).detach())
    return states


def sums_over_paths(chain, inputs):
    """(depth, length) to the sum over the paths of that length of their Jacobians times the state."""
    states = states_of(chain, inputs)
    taken = [sides(block, state)[1] for block, state in zip(chain, states, strict=False)]
    found = {}
    for depth, state in enumerate(states):
        for path in itertools.product(*(each.items() for each in taken[depth:])):
            vector = state
            for _, matrix in path:
                vector = torch.einsum("boi,bi->bo", matrix, vector)
            key = depth, sum(path_length((entry,)) for entry, _ in path)
            found[key] = found.get(key, 0) + vector
    return found


@settings(max_examples=40, deadline=None)
@given(blocks=recipes(5, 1), seed=st.integers(0, 2**16))
def test_the_sum_of_the_paths_of_each_length(blocks, seed):
    chain, inputs = build(blocks, seed), batch(2, seed)[0]
    exact = sums_over_paths(chain, inputs)
    frame, logits = read_by(chain, inputs, max_length=None)
    assert list(zip(frame.depth, frame.path_length, strict=True)) == sorted(exact)
    for (depth, length), found in zip(sorted(exact), logits, strict=True):
        state = sum(vector for (place, k), vector in exact.items() if place == depth and k <= length)
        torch.testing.assert_close(found, chain.head(state), rtol=1e-10, atol=1e-10)


def test_columns():
    chain, inputs = build((Recipe(3, "identity"),) * 3, 4), batch(20)[0]
    frame, logits = read_by(chain, inputs, max_length=1)
    with torch.no_grad():
        outputs = chain(inputs)
    predicted = outputs.argmax(1)
    for row, found in zip(frame.itertuples(), logits, strict=True):
        divergence = F.kl_div(found.log_softmax(1), outputs.softmax(1), reduction="none").sum(1)
        order = found.argsort(1, descending=True)
        rank = 1.0 + (order == predicted[:, None]).int().argmax(1)
        assert row.kl_divergence == pytest.approx(divergence.mean().item(), abs=1e-12)
        assert row.kl_divergence_se == pytest.approx(divergence.std().item() / 20**0.5, abs=1e-12)
        assert row.agreement == pytest.approx((found.argmax(1) == predicted).double().mean().item())
        assert row.agreement_low <= row.agreement <= row.agreement_high
        assert row.prediction_rank == pytest.approx(rank.mean().item())
    assert frame.num_paths.tolist() == [1, 4, 1, 3, 1, 2, 1]
    assert frame.block.tolist() == ["stem", "stem", "block0", "block0", "block1", "block1", "block2"]
    at_the_end = frame.iloc[-1]
    assert at_the_end.kl_divergence == pytest.approx(0, abs=1e-12)
    assert at_the_end.agreement == at_the_end.prediction_rank == 1


def test_batches_are_split_without_a_change():
    chain, inputs = build((Recipe(3, "identity"),) * 3, 4), batch(7)[0]
    whole = rp.lens(chain, inputs, max_length=None)
    parts = rp.lens(chain, [(inputs[:3], None), (inputs[3:], torch.zeros(4))], max_length=None, memory_budget=5000)
    for column in ("kl_divergence", "agreement", "prediction_rank_se"):
        np.testing.assert_allclose(parts[column], whole[column], atol=1e-12)


def test_logit_and_jacobian_lens_of_a_language_model():
    model, chain, tokens = made("gpt2")
    states = [model.embedding(tokens) + model.positions]
    for branch in model.branches:
        states += [states[-1] + branch(states[-1])]
    frame, logits = read_by(chain, tokens, max_length=None)
    rows = dict(zip(zip(frame.depth, frame.path_length, strict=True), logits, strict=True))

    def above(depth):
        def run(x):
            for index in range(depth, 4):
                x = x + model.branches[index](x)
            return x

        return run

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for depth, state in enumerate(states):
            torch.testing.assert_close(rows[depth, 0], model.head(model.norm(state)), rtol=0, atol=1e-12)
            _, pushed = torch.autograd.functional.jvp(above(depth), state, state)
            torch.testing.assert_close(rows[depth, 4 - depth], model.head(model.norm(pushed)), rtol=0, atol=1e-12)
    last = rp.lens(chain, tokens, max_length=0, logits=lambda outputs: outputs[:, -1])
    outputs = model(tokens)[:, -1].log_softmax(1)
    found = model.head(model.norm(states[0]))[:, -1].log_softmax(1)
    divergence = (outputs.exp() * (outputs - found)).sum(1).mean().item()
    assert last.kl_divergence[0] == pytest.approx(divergence, abs=1e-12)


def test_detached_lens_holds_attention_and_norms():
    """It differs from the tangent wherever a branch is on the path, and nowhere else."""
    _, chain, tokens = made("gpt2")
    frame, logits = read_by(chain, tokens, max_length=None, linearization="detached")
    assert frame.attrs["tangent_operations"] == []
    tangent = read_by(chain, tokens, max_length=None)[1]
    same = [torch.allclose(one, other) for one, other in zip(logits, tangent, strict=True)]
    assert [k for k, equal in zip(frame.path_length, same, strict=True) if equal] == [0] * 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_models_of_torchvision(name):
    models = pytest.importorskip("torchvision").models
    with seeded(7):
        if name == "vit":
            model = models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5)
            nn.init.normal_(model.heads.head.weight)
        else:
            model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
        model, inputs = model.double().eval(), torch.randn(2, 3, 32, 32).double()
    chain = rp.unravel(model, inputs, verify=False)
    frame, logits = read_by(chain, inputs, max_length=None)
    rows = dict(zip(zip(frame.depth, frame.path_length, strict=True), logits, strict=True))
    states = states_of(chain, inputs)

    def above(depth):
        def run(x):
            for block in list(chain)[depth:]:
                x = block(x)
            return x

        return run

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for depth, state in enumerate(states):
            _, pushed = torch.autograd.functional.jvp(above(depth), state, state)
            torch.testing.assert_close(rows[depth, len(chain) - depth], chain.head(pushed), rtol=0, atol=1e-9)
    if name == "vit":
        read = [model.heads(model.encoder.ln(state)[:, 0]) for state in states]
        for depth, expected in enumerate(read):
            torch.testing.assert_close(rows[depth, 0], expected, rtol=0, atol=1e-12)


def test_context_is_held():
    with seeded(5):
        blocks = [Block(WithContext(), nn.Identity(), name=f"block{i}") for i in range(2)]
        chain = ResidualChain(Stem(), blocks, nn.Linear(3, 4), ["extra"]).double().eval()
    inputs = batch()[0]
    _, logits = read_by(chain, inputs, max_length=None)
    state, extra = chain.stem(inputs)

    def run(x):
        for block in blocks:
            x = block(x, extra=extra)
        return x

    _, pushed = torch.autograd.functional.jvp(run, state, state)
    torch.testing.assert_close(logits[2], chain.head(pushed), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": -1}, "max_length: got -1"),
        ({"linearization": "secant"}, "linearization"),
        ({"logits": lambda outputs: outputs[:, :1]}, "logits of two or more classes"),
        ({"logits": lambda outputs: outputs[0]}, "logits of two or more classes"),
    ],
)
def test_refusals(options, message):
    chain = build((Recipe(2, "identity"),) * 2)
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.lens(chain, batch()[0], **options)

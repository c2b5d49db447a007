"""Iterative inference against plain PyTorch on small networks: early exits, and gradients by autograd."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.gradients.gradient_reference import Recipe, batch, build, seeded
from tests.predictions.plain_networks import made

MEANS = (
    "cross_entropy",
    "cross_entropy_change",
    "first_order_change",
    "gradient_cosine",
    "early_exit_gradient_cosine",
    "update_ratio",
    "state_angle",
    "update_angle",
)


def same(x):
    return x


def parts_of(name):
    """Output of the stem, blocks, their skips and head of a model, written out."""
    model, chain, inputs = made(name)
    blocks = [lambda x, f=branch: x + f(x) for branch in model.branches]
    skips = [same] * 4
    head = {
        "resnet": lambda x: model.head(model.norm(x).relu().mean((2, 3))),
        "vit": lambda x: model.head(model.norm(x)[:, 0]),
        "gpt2": lambda x: model.head(model.norm(x)),
    }[name]
    if name == "resnet":
        state = model.stem(inputs)
        skips[2] = lambda x: model.projection(model.shared(x))
        blocks[2] = lambda x: skips[2](x) + model.branches[2](model.shared(x))
    elif name == "vit":
        patches = model.patches(inputs).flatten(2).transpose(1, 2)
        state = torch.cat([model.token.expand(len(inputs), -1, -1), patches], 1)
    else:
        state = model.embedding(inputs) + model.positions
    return chain, inputs, state, blocks, skips, head


def by_hand(state, blocks, skips, head, targets):
    """Each column of each block, [example] or [example, position]."""

    def run(x, parts):
        for part in parts:
            x = part(x)
        logits = head(x)
        losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.flatten(), reduction="none")
        return logits, losses.reshape(targets.shape)

    def of_each(losses):
        return losses if losses.dim() == 1 else losses.mean(1)

    def cosine(a, b):
        return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=0)

    def degrees(a, b):
        return torch.acos(cosine(a, b)) * 180 / torch.pi

    rows, previous = [], None
    predicted = run(state, blocks)[0].argmax(-1)
    exits = []
    for index, (block, skip) in enumerate(zip(blocks, skips, strict=True)):
        x = state.detach().requires_grad_()
        (whole,) = torch.autograd.grad(of_each(run(x, blocks[index:])[1]).sum(), x)
        z = skip(x).detach().requires_grad_()
        before = of_each(run(z, skips[index + 1 :])[1])
        (slope,) = torch.autograd.grad(before.sum(), z)
        state = block(x).detach()
        logits, after = run(state, skips[index + 1 :])
        update = state - z
        nan = torch.full_like(before, torch.nan)
        exits.append(logits.argmax(-1))
        rows.append({
            "cross_entropy": of_each(after),
            "cross_entropy_change": of_each(after) - before,
            "first_order_change": (update * slope).flatten(1).sum(1),
            "gradient_cosine": cosine(update, whole) if z.shape == x.shape else nan,
            "early_exit_gradient_cosine": cosine(update, slope),
            "update_ratio": update.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1),
            "state_angle": degrees(z, state),
            "update_angle": nan if previous is None or previous.shape != update.shape else degrees(previous, update),
            "error_rate": (logits.argmax(-1) != targets).double(),
        })
        previous = update
    for index, row in enumerate(rows):
        row["final_share"] = torch.stack([found == predicted for found in exits[index:]]).all(0).double()
    return rows


@pytest.mark.parametrize("name", ["resnet", "vit", "gpt2"])
def test_every_column_equals_plain_pytorch(name):
    chain, inputs, state, blocks, skips, head = parts_of(name)
    shape = inputs.shape if name == "gpt2" else (len(inputs),)
    targets = torch.randint(5, shape, generator=torch.Generator().manual_seed(1))
    frame = rp.iterative_inference(chain, inputs, targets)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = by_hand(state, blocks, skips, head, targets)
    assert frame.block.tolist() == [block.name for block in chain]
    for row, of_block in zip(frame.to_dict("records"), expected, strict=True):
        for column in MEANS:
            values = of_block[column].detach()
            assert row[column] == pytest.approx(values.mean().item(), abs=1e-9, nan_ok=True)
            error = values.std().item() / len(values) ** 0.5
            assert row[f"{column}_se"] == pytest.approx(error, abs=1e-9, nan_ok=True)
        for column in ("error_rate", "final_share"):
            assert row[column] == pytest.approx(of_block[column].mean().item(), abs=1e-12)
            assert row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]
    assert frame.final_share.iloc[-1] == 1
    assert frame.gradient_cosine.isna().tolist() == [name == "resnet" and index == 2 for index in range(4)]


def test_early_exits_are_those_of_the_network_without_later_blocks():
    """With a nonlinearity before or after the addition, and a projection."""
    recipes = (Recipe(3, "identity", post=True), Recipe(4, "projection", pre=True), Recipe(4, "identity", post=True))
    chain = build(recipes, 2)
    inputs, targets = batch(30)
    frame = rp.iterative_inference(chain, inputs, targets)
    for index in range(len(chain)):
        logits = rp.delete_blocks(chain, range(index + 1, len(chain)))(inputs).detach()
        assert frame.cross_entropy[index] == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-12)
        wrong = (logits.argmax(1) != targets).double()
        assert frame.error_rate[index] == pytest.approx(wrong.mean().item())
    start = F.cross_entropy(rp.delete_blocks(chain, range(len(chain)))(inputs), targets).item()
    changes = np.cumsum(frame.cross_entropy_change) + start
    np.testing.assert_allclose(changes, frame.cross_entropy, atol=1e-12)


def test_the_first_order_change_is_that_of_a_small_update():
    chain = build((Recipe(3, "identity"),) * 3, 5)
    inputs, targets = batch(10)
    small = rp.iterative_inference(rp.scale_block(chain, 1, 1e-5), inputs, targets)
    assert small.cross_entropy_change[1] == pytest.approx(small.first_order_change[1], rel=1e-3)
    assert small.update_ratio[1] < 1e-4


def test_batches_and_parts_of_batches_change_nothing():
    chain = build((Recipe(3, "identity"),) * 3, 4)
    inputs, targets = batch(7)
    whole = rp.iterative_inference(chain, inputs, targets)
    loader = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    parts = rp.iterative_inference(chain, loader, memory_budget=2000, progress=False)
    for column in whole.columns[4:]:
        np.testing.assert_allclose(parts[column], whole[column], atol=1e-12)
    assert parts.attrs["num_examples"] == 7


def test_predicted_classes_are_the_default_targets():
    chain, inputs = build((Recipe(3, "identity"),) * 3, 4), batch(7)[0]
    predicted = chain(inputs).argmax(1)
    frame = rp.iterative_inference(chain, inputs)
    np.testing.assert_allclose(frame.cross_entropy, rp.iterative_inference(chain, inputs, predicted).cross_entropy)
    assert frame.error_rate.iloc[-1] == 0


def test_plain_blocks_are_replaced_by_the_identity_where_they_keep_the_shape():
    with seeded(3):
        widths = [3, 3, 5, 5, 5]
        layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
        blocks = [
            Block(layer, None, name=f"b{i}", in_shape=(layer[0].in_features,), out_shape=(layer[0].out_features,))
            for i, layer in enumerate(layers)
        ]
        chain = ResidualChain(nn.Identity(), blocks, nn.Linear(5, 4)).double().eval()
        inputs, targets = torch.randn(6, 3).double(), torch.randint(4, (6,))
    frame = rp.iterative_inference(chain, inputs, targets)
    # No exit before the block that changes the shape; its output has one.
    assert frame.cross_entropy.isna().tolist() == [True, False, False, False]
    assert frame.cross_entropy_change.isna().tolist() == [True, True, False, False]
    assert frame.final_share_low.isna().tolist() == frame.error_rate.isna().tolist() == [True, False, False, False]
    assert frame.update_ratio.isna().tolist() == [False, True, False, False]
    state = layers[1](layers[0](inputs))
    after = layers[2](state)
    assert frame.cross_entropy[1] == pytest.approx(F.cross_entropy(chain.head(state), targets).item())
    ratio = (after - state).norm(dim=1) / state.norm(dim=1)
    assert frame.update_ratio[2] == pytest.approx(ratio.mean().item())


def test_a_deleted_block_has_no_direction():
    chain, (inputs, targets) = build((Recipe(3, "identity"),) * 3, 4), batch(7)
    frame = rp.iterative_inference(rp.delete_block(chain, 1), inputs, targets)
    assert frame.update_ratio[1] == frame.cross_entropy_change[1] == 0
    assert frame[["gradient_cosine", "early_exit_gradient_cosine", "update_angle"]].loc[1].isna().all()
    assert np.isnan(frame.update_angle[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": torch.zeros(3)}, r"targets: got 'torch.float32 \[3\]'; allowed: class indices \[3\]"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"class indices \[3\]"),
        ({"targets": torch.tensor([0, 9, 1])}, "targets: got .*9.*class indices from 0 to"),
        ({"logits": lambda outputs: outputs[:, :1]}, "logits of two or more classes"),
        ({"logits": 3}, "logits: got 3"),
    ],
)
def test_refusals(options, message):
    chain = build((Recipe(2, "identity"),) * 2)
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.iterative_inference(chain, batch(3)[0], **options)

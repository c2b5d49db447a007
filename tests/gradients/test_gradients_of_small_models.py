"""Gradients by path length of small models of each kind, in float64 and float32, and on any device."""

from __future__ import annotations

import copy
import functools

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.gradients.points import Place
from tests.gradients.gradient_reference import (
    Elsewhere,
    OtherDevice,
    Recipe,
    assert_close,
    batch,
    build,
    by_length,
    detached_gradient,
    gated_gradients,
    seeded,
    vectors_of,
)
from tests.gradients.models import convolutional, dense, flat, preactivation, transformer

gradients_of = rp.gradient_by_path_length


@pytest.mark.parametrize("make", [transformer, convolutional, dense, preactivation])
def test_unraveled_models(make):
    with seeded():
        model, shape = make()
        inputs = torch.randn(shape, dtype=torch.float64)
    model = model.double().eval()
    targets = torch.arange(len(inputs))
    chain = rp.unravel(model, inputs)
    assert chain.num_paths == 2 ** len(chain) > 4
    found = by_length(chain, inputs, targets)
    gated = gated_gradients(chain, inputs, targets, len(chain))
    assert_close(torch.stack([found[k] for k in range(len(chain) + 1)]), gated.real.detach())
    leaf = inputs.clone().requires_grad_()
    (whole,) = torch.autograd.grad(F.cross_entropy(model(leaf), targets, reduction="sum"), leaf)
    assert_close(sum(found.values()), whole.flatten(1))
    paths = [p for k in (0, 1, 2, len(chain)) for p in rp.sample_paths(chain, k, 3, torch.Generator().manual_seed(0))]
    (point,) = Place.of(chain, "input").points(inputs, targets, None, 2**31, 1)
    for path, row in zip(paths, vectors_of(point.of_paths(paths)), strict=True):
        assert_close(row, detached_gradient(chain, inputs, targets, path).flatten(1))


MODELS = [transformer, convolutional, dense, preactivation, flat]


@pytest.mark.parametrize("make", MODELS)
def test_unraveled_models_in_float32(make):
    with seeded():
        model, shape = make()
        inputs = torch.randn(shape)
    chain, targets = rp.unravel(model.eval(), inputs), torch.arange(len(inputs))
    single = gradients_of(chain, inputs, targets)
    double = gradients_of(copy.deepcopy(chain).double(), inputs.double(), targets)
    for name in ("summed_path_gradient_norm", "gradient_share"):
        assert_close(single[name], double[name], 1e-5)


def test_a_model_of_words():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            body, _ = transformer()
            self.embedding, self.body, self.head = nn.Embedding(11, 6), body[1:-1], body[-1]

        def forward(self, words):
            return self.head(self.body(self.embedding(words)))

    with seeded():
        model = Model().double().eval()
    words, targets = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0)), torch.arange(3)
    chain = rp.unravel(model, words)
    frame = gradients_of(chain, words, targets, with_respect_to="stem")
    leaf = model.embedding(words).detach().requires_grad_()
    losses = F.cross_entropy(model.head(model.body(leaf)), targets, reduction="sum")
    whole = torch.autograd.grad(losses, leaf)[0].flatten(1)
    found = by_length(chain, words, targets, "stem")
    assert_close(sum(found.values()), whole)
    assert_close(
        frame.gradient_share, [float(((v * whole).sum(1) / whole.square().sum(1)).mean()) for v in found.values()]
    )
    with pytest.raises(rp.ResnetPathsError, match=r"with_respect_to: .*torch.int64 have no gradient.*'stem'"):
        gradients_of(chain, words, targets)


def test_nothing_assumes_the_cpu(monkeypatch):
    make = torch.tensor
    # torch.tensor makes nothing but a shape on "meta".
    monkeypatch.setattr(torch, "tensor", lambda data, device="cpu", **o: make(data, **o).to(device))
    nested = (Recipe(2, "identity"), Recipe(2, "identity", post=True))
    recipe = (
        Recipe(3, "identity", nested, pre=True),
        Recipe(2, "projection", 2, post=True),
        Recipe(2, "concat"),
        Recipe(4, "none"),
        Recipe(3, "identity", "scaled"),
    )
    pairs = build((Recipe(2, "projection"), Recipe(2, "identity")), of_pairs=True)
    with seeded():
        model, shape = convolutional()
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = rp.unravel(model.double().eval(), image)
    studies = [functools.partial(gradients_of, method=method, num_draws=3) for method in ("exact", "energy", "sampled")]
    studies += [
        functools.partial(gradients_of, with_respect_to=("parameters", 1)),
        rp.gradient_by_stage_lengths,
        rp.gradient_through_block,
    ]
    for chain, inputs in ((build(recipe), batch()[0]), (pairs, batch()[0]), (images, image)):
        targets = torch.arange(len(inputs))
        expected = [study(chain, inputs, targets) for study in studies]
        for module in chain.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: Elsewhere(t.detach()) for name, t in tensors.items() if t is not None})
        with OtherDevice():
            for study, frame in zip(studies, expected, strict=True):
                found = study(chain, Elsewhere(inputs), Elsewhere(targets))
                pd.testing.assert_frame_equal(found, frame, rtol=1e-9)
            # Inputs are moved; what a loss brings along from the CPU is told apart from them.
            pd.testing.assert_frame_equal(studies[0](chain, inputs, targets), expected[0], rtol=1e-9)
            with pytest.raises(rp.ResnetPathsError, match=r"loss: .*mixes devices"):
                gradients_of(chain, inputs, targets, loss=lambda z, _: z @ torch.ones(3, dtype=torch.float64))

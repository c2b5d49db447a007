"""Slips in what a chain is called with: labels among the inputs, other dtypes of labels and of inputs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.gradients.jacobians import jacobian_svd
from tests.gradients.gradient_reference import seeded

INSTRUMENTS = {
    "gradients": rp.gradient_by_path_length,
    "gradients at the stem": functools.partial(rp.gradient_by_path_length, with_respect_to="stem"),
    "through blocks": rp.gradient_through_block,
    "depth": rp.gradient_by_depth,
    "moments": rp.path_length_moments,
    "singular values": jacobian_svd,
    "prediction": rp.prediction_by_path_length,
    "direct effects": rp.direct_effects,
    "effect matrix": rp.effect_matrix,
    "lens": rp.lens,
    "iterative": rp.iterative_inference,
    "block norms": rp.block_norms,
}
WITHOUT_LABELS = {
    "singular values",
    "prediction",
    "direct effects",
    "effect matrix",
    "lens",
    "iterative",
    "block norms",
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.inp(x)
        return self.out(x + torch.tanh(self.layer(x)))


def images_and_labels():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, generator=generator).double(), torch.tensor([0, 1, 1, 0])


@functools.cache
def chain_of(kind):
    with seeded(1):
        model = Model().double().eval()
    if kind == "unraveled":
        return rp.unravel(model, images_and_labels()[0])
    blocks = [Block(nn.Sequential(model.layer, nn.Tanh()), nn.Identity(), name="block")]
    return ResidualChain(model.inp, blocks, model.out).eval()


@pytest.mark.parametrize("kind", ["unraveled", "by hand"])
@pytest.mark.parametrize("name", INSTRUMENTS)
def test_labels_among_the_inputs_are_one_clear_error(name, kind):
    for given in (images_and_labels(), [*images_and_labels()]):
        with pytest.raises(rp.ResnetPathsError, match=r"got .*; allowed: .*Labels are no input: pass them as targets"):
            INSTRUMENTS[name](chain_of(kind), given)


def test_an_error_inside_a_stem_is_not_one_of_its_arguments():
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) + "1"

    chain = ResidualChain(Broken(3, 4), list(chain_of("by hand")), nn.Linear(4, 4)).double().eval()
    with pytest.raises(TypeError, match="unsupported operand"):
        chain(images_and_labels()[0])
    with pytest.raises(rp.ResnetPathsError, match=r"got '\(torch.float64 \[4, 3\], scale=float\)'; .*stem, x\."):
        chain(images_and_labels()[0], scale=2.0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_labels_of_any_integer_dtype(dtype):
    chain, (images, labels) = chain_of("by hand"), images_and_labels()
    for instrument in (rp.gradient_by_path_length, rp.gradient_by_depth, rp.iterative_inference):
        expected = instrument(chain, images, labels)
        for found in (
            instrument(chain, images, labels.to(dtype)),
            instrument(chain, [(images, labels.to(dtype))], progress=False),
        ):
            numbers = expected.select_dtypes("float").columns
            np.testing.assert_array_equal(found[numbers], expected[numbers])
    if dtype != torch.bool:
        with pytest.raises(rp.ResnetPathsError, match=r"targets: got \[0, 9\]; allowed: class indices from 0 to 3"):
            rp.gradient_by_path_length(chain, images, (9 * labels).to(dtype))


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_a_stem_without_weights_does_not_hide_another_dtype(name):
    chain = ResidualChain(nn.Flatten(), [Block(nn.Linear(3, 3), nn.Identity(), name="block")], nn.Linear(3, 4))
    images, labels = images_and_labels()
    message = (
        r"inputs: got 'torch\.float32'; allowed: inputs of a dtype that the chain takes, .* torch\.float64\. Convert"
    )
    given = (chain.double().eval(), images.float(), *(() if name in WITHOUT_LABELS else (labels,)))
    with pytest.raises(rp.ResnetPathsError, match=message):
        INSTRUMENTS[name](*given)

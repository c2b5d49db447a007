"""Models with tensors that `torch.inference_mode` made: autograd cannot use them, and the error says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_paths as rp


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class WithoutGradient(nn.Module):
    """The first layer runs in inference mode."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(4, 4), made()

    def forward(self, x):
        with torch.inference_mode():
            x = self.first(x)
        return self.rest(x)


class Whole(WithoutGradient):
    @torch.inference_mode()
    def forward(self, x):
        return self.rest(self.first(x))


def made():
    return nn.Sequential(nn.Linear(4, 4), Block(), Block(), nn.Linear(4, 3)).double().eval()


INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("blocks", [None, ["1", "2"]])
def test_a_model_made_in_inference_mode_is_refused_and_its_copy_is_read(blocks):
    with torch.inference_mode():
        model = made()
    message = r"got \"Sequential, whose '0\.weight' was made in torch\.inference_mode\(\)\".*copy\.deepcopy\(model\)"
    with pytest.raises(rp.UnravelError, match=message):
        rp.unravel(model, INPUTS, blocks=blocks)
    copied = copy.deepcopy(model)
    chain = rp.unravel(copied, INPUTS, blocks=blocks)
    assert torch.equal(chain(INPUTS), copied(INPUTS))
    assert len(chain) == 2


def test_a_buffer_made_in_inference_mode_is_named():
    model = made()
    with torch.inference_mode():
        model[1].norm.running_mean = torch.ones(4, dtype=torch.float64)
    with pytest.raises(rp.UnravelError, match=r"whose '1\.norm\.running_mean' was made in torch\.inference_mode"):
        rp.unravel(model, INPUTS)


def test_inputs_and_calls_in_inference_mode_are_accepted():
    model = made()
    with torch.inference_mode():
        inputs = INPUTS.clone()
        assert len(rp.unravel(model, inputs)) == 2
    assert len(rp.unravel(model, inputs)) == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            WithoutGradient,
            r"WithoutGradient, which computes with tensors made in torch\.inference_mode.*f\(x\.detach\(\)\)",
        ),
        (Whole, r"linear under inference_mode, .*outside no_grad and inference_mode"),
    ],
)
def test_parts_in_inference_mode_are_refused_with_what_to_write(kind, message):
    with pytest.raises(rp.UnravelError, match=message):
        rp.unravel(kind().double().eval(), INPUTS)

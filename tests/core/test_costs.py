"""Memory of a training step against sums made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.costs import _Alive, training_memory


class Exponential(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.exp() + x


def test_bytes_are_those_of_the_tensors():
    memory = training_memory(Exponential(1000), torch.zeros(1))
    assert memory.parameters == 4000
    assert memory.saved == 4000  # the exponential, which its derivative needs
    # Weight, input, exponential, and the sum, whose place the gradient takes; some single numbers.
    assert 4000 * 3 + 4 <= memory.peak <= 4000 * 3 + 40


def test_what_is_let_go_of_is_no_longer_counted():
    with _Alive() as alive:
        x = torch.zeros(250)
        y = x.exp().exp()
        assert (alive.now, alive.peak) == (2000, 3000)
        view = y.view(10, 25)
        del y
        assert alive.now == 2000
        del view
        assert (alive.now, alive.peak) == (1000, 3000)


def test_layers_keep_what_their_derivatives_need():
    layers = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    memory = training_memory(layers, torch.randn(11, 7))
    assert memory.parameters == 4 * (7 * 5 + 5 + 5 * 3)
    assert memory.saved == 4 * 11 * 5  # the input belongs to the caller; ReLU and the second layer share one tensor


def test_memory_grows_with_the_batch_and_nothing_is_changed():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, large = (training_memory(model, torch.randn(n, 1, 8, 8)) for n in (4, 8))
    norm = 4 * 2 * 4  # mean and deviation of four channels, whatever the batch
    assert large.saved - norm == 2 * (small.saved - norm)
    assert large.peak > small.peak > small.saved + small.parameters
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_inference_mode_too():
    with torch.inference_mode():
        assert training_memory(nn.Linear(3, 2), torch.zeros(5, 3)).parameters == 32


@pytest.mark.parametrize("loss", [lambda y: y, lambda y: 3.0, lambda y: y.sum().detach()])
def test_a_loss_is_one_number_that_depends_on_the_weights(loss):
    with pytest.raises(ResnetPathsError, match=r"^loss: got .*a scalar that depends on a parameter"):
        training_memory(nn.Linear(3, 2), torch.zeros(5, 3), loss)

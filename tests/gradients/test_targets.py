"""Targets that the default loss takes, and those that it refuses, since they would be read as something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.gradients.gradient_reference import seeded


def chain_of(num_outputs=3):
    with seeded():
        blocks = [Block(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Identity(), name=f"{i}") for i in range(2)]
        return ResidualChain(nn.Linear(5, 4), blocks, nn.Linear(4, num_outputs)).double().eval()


def inputs():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


REGRESSION = r"targets: got 'torch.float\d\d \[4, 3\]'; allowed: .*sum to 1.*For a regression, pass loss="
REFUSED = {
    "numbers of a regression": (torch.linspace(-1, 1, 12).double().view(4, 3), 3, REGRESSION),
    "numbers that are not negative": (torch.linspace(0, 1, 12).double().view(4, 3), 3, REGRESSION),
    "negative numbers that sum to 1": (torch.tensor([[1.5, -0.25, -0.25]] * 4), 3, REGRESSION),
    "NaN": (torch.full((4, 3), torch.nan), 3, REGRESSION),
    "indices as floating numbers": (torch.tensor([0.0, 1, 2, 0]), 3, r"targets: got 'torch.float32 \[4\]'.*integers"),
    "one logit, floating labels": (torch.tensor([0.0, 1, 1, 0]), 1, r"loss: got None; .*one logit.*binary_cross"),
    "one logit, labels in a column": (torch.zeros(4, 1), 1, r"loss: got None; .*one logit.*binary_cross"),
    "one logit, indices": (torch.zeros(4, dtype=torch.long), 1, r"loss: got None; .*one logit"),
    "ignored labels": (
        torch.tensor([0, -100, 2, 1]),
        3,
        r"targets: got \[-100, 2\]; .*from 0 to 2.*Leave out examples",
    ),
    "too many classes": (torch.tensor([0, 3, 2, 1]), 3, r"targets: got \[0, 3\]; allowed: class indices from 0 to 2"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_targets_that_are_not_those_of_cross_entropy(kind):
    targets, num_outputs, message = REFUSED[kind]
    chain = chain_of(num_outputs)
    for instrument in (rp.gradient_by_path_length, rp.gradient_by_depth):
        with pytest.raises(rp.ResnetPathsError, match=message):
            instrument(chain, inputs(), targets)


def norms(chain, loss):
    leaf = inputs().requires_grad_()
    return torch.autograd.grad(loss(chain(leaf)), leaf)[0].norm(dim=1).mean().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_class_probabilities(dtype):
    chain = chain_of()
    targets = torch.softmax(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), 1).to(dtype)
    targets[0] = torch.tensor([0.0, 1.0, 0.0])
    frame = rp.gradient_by_depth(
        ResidualChain(nn.Identity(), [], nn.Sequential(*in_a_row(chain))).eval(), inputs(), targets
    )
    expected = norms(chain, lambda logits: -(targets.double() * torch.log_softmax(logits, 1)).sum())
    assert frame.gradient_norm[0] == pytest.approx(expected, rel=1e-12)


def in_a_row(chain):
    return [chain.stem, *chain, chain.head]


def test_the_losses_that_messages_propose():
    chain, targets = chain_of(), torch.linspace(-1, 1, 12).double().view(4, 3)
    frame = rp.gradient_by_path_length(
        chain, inputs(), targets, loss=lambda outputs, targets: (outputs - targets).square().flatten(1).mean(1)
    )
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)
    chain, labels = chain_of(1), torch.tensor([0, 1, 1, 0])

    def binary(logits, targets):
        return F.binary_cross_entropy_with_logits(
            logits.flatten(), targets.flatten().to(logits.dtype), reduction="none"
        )

    for given in (labels, labels.double()[:, None]):
        frame = rp.gradient_by_path_length(chain, inputs(), given, loss=binary)
        assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)

"""Norms of blocks that change the number of tokens, in batches with padding and with infinite numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain


class Stem(nn.Module):
    """The states [batch, token, feature]; the mask is for the measurement alone."""

    def forward(self, states, attention_mask):
        return states


class Halved(nn.Module):
    """Means of pairs of tokens, times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, state):
        return self.factor * state.unflatten(1, (-1, 2)).mean(2)


def test_each_norm_counts_the_examples_of_its_own_tokens():
    """An example that is padding alone has no input; what it has after the tokens were merged has no mask."""
    states = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    chain = ResidualChain(Stem(), [Block(Halved(2.0), Halved(1.0), name="pairs")], nn.Identity()).eval()
    frame = rp.block_norms(chain, {"states": states, "attention_mask": mask})
    real = states[:2] * mask[:2, :, None]
    merged = states.unflatten(1, (-1, 2)).mean(2)
    assert frame.input_norm[0] == pytest.approx(real.flatten(1).norm(dim=1).mean().item())
    for name, factor in (("skip_norm", 1), ("branch_norm", 2), ("sum_norm", 3)):
        assert frame[name][0] == pytest.approx(factor * merged.flatten(1).norm(dim=1).mean().item())
    assert frame.cosine[0] == pytest.approx(1)
    assert frame.kept_signal_share[0] == pytest.approx(1 / 3)


def test_infinite_norms_are_not_left_out():
    chain = ResidualChain(nn.Identity(), [Block(nn.ReLU(), nn.Identity(), name="block")], nn.Identity()).eval()
    frame = rp.block_norms(chain, torch.tensor([[1.0, 2.0], [torch.inf, 1.0]]).double())
    assert frame.input_norm.tolist() == frame.branch_norm.tolist() == [np.inf]
    assert frame.cosine[0] == pytest.approx(1)  # an infinite vector has no direction

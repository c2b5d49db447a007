"""Logits of early exits and lenses that are NaN or infinite, masked classes, and branches whose output is 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.gradients.gradient_reference import seeded

INPUTS = torch.tensor([[0.0, 1, 2], [-2.0, 0, 0], [1.0, 0, 0]]).double()


class Root(nn.Module):
    """Logits of which the first is NaN where the state is below -1."""

    def forward(self, state):
        return torch.cat([(state[:, :1] + 1).sqrt(), state[:, 1:]], 1)


class Masked(nn.Linear):
    """Logits of which the last is minus infinity."""

    def forward(self, state):
        return super().forward(state).index_fill(1, torch.tensor([self.out_features - 1]), -torch.inf)


class Constant(nn.Module):
    """The same numbers for every example."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values).double())

    def forward(self, state):
        return self.values.expand_as(state)


def chain_of(branches, head):
    blocks = [
        Block(branch, nn.Identity(), name=f"b{i}", in_shape=(3,), out_shape=(3,)) for i, branch in enumerate(branches)
    ]
    return ResidualChain(nn.Identity(), blocks, head).double().eval()


def test_logits_that_are_not_finite_predict_no_class():
    """The second example has no exit before the second block lifts its state."""
    chain = chain_of([Constant([0.0, 0, 0]), Constant([3.0, 0, 0])], Root())
    targets = torch.tensor([2, 0, 0])
    early, final = (rp.delete_block(chain, 1)(INPUTS), chain(INPUTS))
    assert early[1].isnan().any()
    assert early[1].argmax() == final[1].argmax() == targets[1]  # what NaN must not be counted as
    frame = rp.iterative_inference(chain, INPUTS, targets)
    known = F.cross_entropy(early, targets, reduction="none")[[0, 2]]
    assert frame.cross_entropy[0] == pytest.approx(known.mean().item())
    wrong = [(early[i].argmax() != targets[i]).item() for i in (0, 2)] + [True]
    assert frame.error_rate[0] == pytest.approx(np.mean(wrong))
    studied = rp.lesion_study(chain, [(INPUTS, targets)], [rp.Lesion("delete", (1,))], progress=False)
    assert frame.error_rate[0] == pytest.approx(studied.error_rate[0])
    same = [(early[i].argmax() == final[i].argmax()).item() for i in (0, 2)] + [False]
    assert frame.final_share[0] == pytest.approx(np.mean(same))

    lens = rp.lens(chain, INPUTS)
    assert lens.agreement[1] == pytest.approx(np.mean(same))
    ranks = [1 + (early[i] > early[i, final[i].argmax()]).sum().item() for i in (0, 2)] + [3]
    assert lens.prediction_rank[1] == pytest.approx(np.mean(ranks))


@pytest.mark.parametrize("function", [rp.lens, rp.iterative_inference])
def test_a_network_without_predictions_is_refused(function):
    chain = chain_of([Constant([0.0, 0, 0])], Root())
    with pytest.raises(rp.ResnetPathsError, match="NaN or infinity in the logits of the network"):
        function(chain, INPUTS)


def test_masked_classes_add_nothing_to_the_divergence():
    with seeded(2):
        chain = chain_of([nn.Linear(3, 3), nn.Linear(3, 3)], Masked(3, 5))
    frame = rp.lens(chain, INPUTS)
    without_mask = rp.lens(chain, INPUTS, logits=lambda outputs: outputs[:, :-1])
    for name in ("kl_divergence", "kl_divergence_se", "agreement", "prediction_rank"):
        np.testing.assert_allclose(frame[name], without_mask[name], atol=1e-12)
    assert frame.kl_divergence[0] > 1e-3
    inference = rp.iterative_inference(chain, INPUTS)
    unmasked = rp.iterative_inference(chain, INPUTS, logits=lambda outputs: outputs[:, :-1])
    np.testing.assert_allclose(inference.cross_entropy, unmasked.cross_entropy, atol=1e-12)


def test_a_divergence_without_bound_is_infinite():
    """The lens gives a class no probability that the network gives some."""

    class MaskedWhereSmall(nn.Module):
        def forward(self, state):
            return torch.where(state < -1, -torch.inf, state)

    frame = rp.lens(chain_of([Constant([3.0, 0, 0])], MaskedWhereSmall()), INPUTS)
    assert frame.kl_divergence.tolist() == [np.inf, 0]
    assert np.isnan(frame.kl_divergence_se[0])


@pytest.mark.parametrize(("later", "expected"), [(0.0, np.nan), (1.0, np.inf)])
def test_relative_changes_of_branches_without_output(later, expected):
    """0 / 0 has no value; what changes from 0 changes without bound."""

    class Gate(nn.Module):
        """0 for the intact network; after the deletion `later` times the state for the first example."""

        def forward(self, state):
            return later * state.clamp(max=0) * (torch.arange(3) == 0)[:, None]

    lift = Constant([5.0, 5, 5])
    chain = chain_of([lift, Gate(), nn.Linear(3, 3)], nn.Linear(3, 4))
    inputs = INPUTS - 3
    frame = rp.effect_matrix(chain, inputs).set_index(["deleted_index", "block_index"])
    assert frame.max_relative_change[0, 1] == pytest.approx(expected, nan_ok=True)
    assert frame.relative_change[0, 1] == pytest.approx(expected, nan_ok=True)


def test_tokens_without_output_are_left_out():
    """Of tokens whose branch gives 0 before and after, and of others, the ratio of the others."""
    with seeded(4):
        layers = [nn.Linear(3, 3, bias=False) for _ in range(2)]
        blocks = [Block(layer, nn.Identity(), name=f"b{i}") for i, layer in enumerate(layers)]
        chain = ResidualChain(nn.Identity(), blocks, nn.Linear(3, 4)).double().eval()
        tokens = torch.randn(2, 5, 3).double()
    padded = torch.cat([tokens, torch.zeros(2, 2, 3).double()], 1)

    def read(outputs):
        return outputs[:, 0, 0]

    frame, expected = (rp.effect_matrix(chain, x, output=read) for x in (padded, tokens))
    for name in ("relative_change", "relative_change_se", "max_relative_change"):
        np.testing.assert_allclose(frame[name], expected[name], atol=1e-12)

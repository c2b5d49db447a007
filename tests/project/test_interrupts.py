"""Every long call, stopped by hand in the middle: the chain and the numbers stay."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from tests.chains import Plan, assert_same, inputs, random_chain, snapshot

PLAN = (3, tuple(Plan(3, "identity", False, False) for _ in range(4)))
X, Y = inputs(8), torch.arange(8) % 3
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]
QUIET = {"progress": False}


def drawn(**options):
    return QUIET | options | {"generator": torch.Generator().manual_seed(0)}


CALLS = {
    "block_norms": lambda chain, loader: rp.block_norms(chain, loader),
    "deletion_account": lambda chain, loader: rp.deletion_account(chain, loader, **drawn()),
    "direct_effects": lambda chain, loader: rp.direct_effects(chain, loader, **drawn()),
    "effect_matrix": lambda chain, loader: rp.effect_matrix(chain, loader, **QUIET),
    "gradient_by_depth": lambda chain, loader: rp.gradient_by_depth(chain, loader, **QUIET),
    "gradient_by_path_length": lambda chain, loader: rp.gradient_by_path_length(chain, loader, **QUIET),
    "gradient_by_path_length, sampled": lambda chain, loader: rp.gradient_by_path_length(
        chain, loader, **drawn(method="sampled", num_draws=20)
    ),
    "gradient_by_stage_lengths": lambda chain, loader: rp.gradient_by_stage_lengths(chain, loader, **QUIET),
    "gradient_through_block": lambda chain, loader: rp.gradient_through_block(chain, loader, **QUIET),
    "iterative_inference": lambda chain, loader: rp.iterative_inference(chain, loader, **QUIET),
    "jacobian_svd": lambda chain, loader: rp.jacobian_svd(chain, loader, rank=1, tolerance=0, **QUIET).to_frame(),
    "lens": lambda chain, loader: rp.lens(chain, loader, **QUIET),
    "lesion_study": lambda chain, loader: rp.lesion_study(chain, loader, rp.single_deletions(chain), **QUIET),
    "path_length_moments": lambda chain, loader: pd.DataFrame([vars(rp.path_length_moments(chain, loader, **QUIET))]),
    "predicted_effects": lambda chain, loader: rp.predicted_effects(chain, loader, **QUIET),
    "prediction_by_path_length": lambda chain, loader: rp.prediction_by_path_length(chain, loader, **QUIET),
    "subset_values": lambda chain, loader: rp.subset_values(chain, loader, **QUIET).drop(columns="influences"),
}


@pytest.fixture(scope="module")
def alone():
    """What each call returns when nothing else runs."""
    return {name: call(random_chain(PLAN), BATCHES) for name, call in CALLS.items()}


def same(frame, expected):
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-12, atol=1e-12)


def stopping():
    """One batch, and then somebody presses Ctrl-C."""
    yield BATCHES[0]
    raise KeyboardInterrupt


class Pressed(nn.Module):
    """A part during which Ctrl-C is pressed once, in the second batch."""

    def __init__(self, part):
        super().__init__()
        self.part, self.armed = part, False

    def forward(self, x):
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return self.part(x)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("trained", [False, True])
def test_ctrl_c_leaves_the_chain_and_the_modes_as_they_were(trained, name, alone):
    """Also where some parts that do not depend on it are in training mode, and some weights take no gradient."""
    chain = random_chain(PLAN)
    pressed = Pressed(chain[2].branch)
    blocks = [block.replace(branch=pressed) if block is chain[2] else block for block in chain]
    chain = ResidualChain(chain.stem, blocks, chain.head).eval()
    if trained:
        pressed.train()
        next(chain.parameters()).requires_grad_(False)

    def arming():
        for number, batch in enumerate(BATCHES):
            pressed.armed = number == 1
            yield batch

    before = snapshot(chain)
    for loader in (stopping(), arming()):
        with pytest.raises(KeyboardInterrupt):
            CALLS[name](chain, loader)
        assert_same(before, snapshot(chain))
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not pressed.armed
    same(CALLS[name](chain, BATCHES), alone[name])


@pytest.mark.parametrize("name", ["effect_matrix", "gradient_by_depth", "gradient_by_stage_lengths"])
def test_bars_state_batches_and_examples(name, capsys):
    arguments = [random_chain(PLAN), iter([(X[:4], Y[:4]), (X[4:7], Y[4:7]), (X[7:], Y[7:])])]
    getattr(rp, name)(*arguments)
    bar = capsys.readouterr().err
    assert "3batch" in bar
    assert "8 examples" in bar

"""Chains of a stem and a head alone, and places behind which no block is left: frames without rows, or one path."""

from __future__ import annotations

import functools

import pytest
from torch import nn

import resnet_paths as rp
from resnet_paths import gradients
from resnet_paths.core.chain import ResidualChain
from tests.gradients.gradient_reference import Recipe, batch, build, seeded

exact = functools.partial(rp.gradient_by_path_length, progress=False)
OF_ONE_PATH = {
    "exact": exact,
    "energy": functools.partial(exact, method="energy"),
    "signs": functools.partial(exact, method="energy", paths="signs", num_draws=4),
    "sampled": functools.partial(exact, method="sampled"),
    "uniform": functools.partial(exact, method="sampled", paths="uniform", num_draws=4),
}
OF_BLOCKS = {
    "through branches": rp.gradient_through_block,
    "norms through branches": functools.partial(rp.gradient_through_block, norms=True),
    "probabilities": gradients.branch_probabilities,
    "covariances": gradients.pair_covariances,
}
OF_STATES = {
    "effect matrix": lambda chain, x, _: rp.effect_matrix(chain, x),
    "account": lambda chain, x, _: rp.deletion_account(chain, x),
    "iterative": rp.iterative_inference,
    "block norms": lambda chain, x, _: rp.block_norms(chain, x),
}


def without_blocks():
    with seeded(2):
        return ResidualChain(nn.Linear(5, 4), [], nn.Linear(4, 3)).double().eval()


@pytest.mark.parametrize("name", [*OF_BLOCKS, *OF_STATES])
def test_frames_of_no_blocks_have_the_columns_of_others_and_no_rows(name):
    instrument = {**OF_BLOCKS, **OF_STATES}[name]
    frame = instrument(without_blocks(), *batch())
    expected = instrument(build((Recipe(3, "identity"),) * 3), *batch())
    assert not len(frame)
    assert list(frame.columns) == list(expected.columns)
    measured = expected.select_dtypes("float").columns
    assert (frame[measured].dtypes == "float64").all()


@pytest.mark.parametrize("name", OF_BLOCKS)
def test_nothing_is_left_behind_the_last_block(name):
    chain = build((Recipe(3, "identity"),) * 2)
    assert not len(OF_BLOCKS[name](chain, *batch(), with_respect_to=1))


@pytest.mark.parametrize("name", OF_ONE_PATH)
def test_the_only_path_has_the_gradient_of_autograd(name):
    chain, (inputs, targets) = without_blocks(), batch()
    leaf = inputs.clone().requires_grad_()
    nn.functional.cross_entropy(chain(leaf), targets, reduction="sum").backward()
    norm = leaf.grad.norm(dim=1)
    frame = OF_ONE_PATH[name](chain, inputs, targets)
    assert frame.num_paths.tolist() == [1]
    found = {
        "summed_path_gradient_norm": norm.mean(),
        "mean_path_gradient_norm": norm.mean(),
        "rms_path_gradient_norm": norm.square().mean().sqrt(),
    }
    assert found.keys() & set(frame.columns)
    for column in found.keys() & set(frame.columns):
        assert frame[column][0] == pytest.approx(found[column].item(), rel=1e-10)


def test_effects_of_a_single_block_reach_no_other():
    chain = build((Recipe(3, "identity"),))
    inputs = batch()[0]
    assert not len(rp.effect_matrix(chain, inputs))
    account = rp.deletion_account(chain, inputs, output=lambda outputs: outputs[:, 0])
    change = (rp.delete_block(chain, 0)(inputs) - chain(inputs))[:, 0]
    assert account.total_effect.tolist() == pytest.approx([change.mean().item()])

"""Branches and skips that the addition of a block broadcasts, against the same with the shape written out."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths import gradients
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Parallel
from tests.gradients.gradient_reference import seeded


class Expanded(nn.Module):
    """A part whose output is expanded to the width of the state."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, state):
        return self.part(state).expand(len(state), 4)


class Shared(nn.Module):
    """The same numbers for all examples, without a dimension of the batch."""

    def forward(self, state):
        return torch.arange(4.0, dtype=state.dtype)


class Mean(nn.Module):
    """One number of each example."""

    def forward(self, state):
        return state.mean(1, keepdim=True)


def gate():
    return nn.Sequential(nn.Linear(4, 1), nn.Tanh())


def wide():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def inner():
    return ResidualChain(nn.Linear(4, 3), [Block(nn.Linear(3, 3), nn.Identity(), name="in")], nn.Linear(3, 1))


def chains(kind):
    """A chain with a block that broadcasts, and the one in which the shapes are equal."""
    with seeded(1):
        first, last = (Block(wide(), nn.Identity(), name=name) for name in ("first", "last"))
        narrow = {"nested": inner, "shared": Shared}.get(kind, gate)()
        both = []
        for write in (lambda part: part, Expanded):
            if kind == "skip":
                block = Block(first.branch, write(Mean()), name="narrow")
            elif kind == "nested":
                branch = ResidualChain(narrow.stem, list(narrow), write(narrow.head))
                block = Block(branch, nn.Identity(), name="narrow")
            elif kind == "parallel":
                block = Block(Parallel([write(narrow), last.branch]), nn.Identity(), name="narrow")
            elif kind == "plain":  # no skip: two branches
                block = Block(Parallel([last.branch, write(narrow)]), None, name="narrow")
            else:
                block = Block(write(narrow), nn.Identity(), name="narrow")
            both.append(block)
        stem, head = nn.Linear(3, 4), nn.Linear(4, 4)
        return [ResidualChain(stem, [first, block, last], head).double().eval() for block in both]


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, generator=generator).double(), torch.randint(4, (5,), generator=generator)


exact = functools.partial(rp.gradient_by_path_length, progress=False)
INSTRUMENTS = {
    "exact": exact,
    "energy": functools.partial(exact, method="energy"),
    "signs": functools.partial(exact, method="energy", paths="signs", num_draws=4),
    "sampled": functools.partial(exact, method="sampled", num_draws=200),
    "uniform": functools.partial(exact, method="sampled", paths="uniform", num_draws=4),
    "parameters": functools.partial(exact, with_respect_to=("parameters", 1)),
    "stages": rp.gradient_by_stage_lengths,
    "through": rp.gradient_through_block,
    "norms through": functools.partial(rp.gradient_through_block, norms=True),
    "depth": rp.gradient_by_depth,
    "pairs": gradients.pair_covariances,
    "branches": gradients.branch_probabilities,
    "prediction": lambda chain, x, _: rp.prediction_by_path_length(chain, x, by_source=True),
    "detached": lambda chain, x, _: rp.prediction_by_path_length(chain, x, linearization="detached"),
    "direct": lambda chain, x, _: rp.direct_effects(chain, x),
    "effects": lambda chain, x, _: rp.effect_matrix(chain, x),
    "account": lambda chain, x, _: rp.deletion_account(chain, x),
    "lens": lambda chain, x, _: rp.lens(chain, x, max_length=None),
    "iterative": rp.iterative_inference,
    "block norms": lambda chain, x, _: rp.block_norms(chain, x),
}


@pytest.mark.parametrize("kind", ["branch", "skip", "nested", "parallel", "plain", "shared"])
def test_what_an_addition_broadcasts_is_as_if_written_out(kind):
    chain, written_out = chains(kind)
    inputs, targets = batch()
    torch.testing.assert_close(chain(inputs), written_out(inputs), rtol=0, atol=0)
    # A constant has no parameters; without its branch, a block with such a skip changes the shape of the state.
    left_out = {"shared": {"parameters"}, "skip": {"effects", "account", "iterative"}}.get(kind, set())
    for name in INSTRUMENTS.keys() - left_out:
        instrument = INSTRUMENTS[name]
        found, expected = (instrument(one, inputs, targets) for one in (chain, written_out))
        numbers = expected.select_dtypes("number").columns
        assert list(found.columns) == list(expected.columns)
        for column in numbers:
            values = (frame[column].astype(float).to_numpy() for frame in (found, expected))
            np.testing.assert_allclose(*values, rtol=1e-8, atol=1e-10, err_msg=f"{name}: {column}")


@pytest.mark.parametrize("kind", ["branch", "skip", "nested", "parallel", "plain"])
def test_the_whole_gradient_is_that_of_autograd(kind):
    chain, (inputs, targets) = chains(kind)[0], batch()
    depth = rp.gradient_by_depth(chain, inputs, targets)
    state = chain.stem(inputs).detach().requires_grad_()
    rest = ResidualChain(nn.Identity(), list(chain), chain.head)
    nn.functional.cross_entropy(rest(state), targets, reduction="sum").backward()
    assert depth.gradient_norm[0] == pytest.approx(state.grad.norm(dim=1).mean().item(), rel=1e-10)
    frame = exact(chain, inputs, targets)
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-10)

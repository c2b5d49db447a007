"""Training mode is refused where it matters, and only there."""

from __future__ import annotations

import functools

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.costs import forward_cost
from resnet_paths.core.modes import depends_on_mode
from resnet_paths.core.parts import LinearCombination, Parallel
from resnet_paths.zoo.random_depth import DrawnBlock


class InForward(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=self.training)


class Inherits(InForward):
    pass


class InMethod(nn.Module):
    def forward(self, x):
        return self.noisy(x)

    def noisy(self, x):
        return F.dropout(x, training=self.training)


class InProperty(nn.Module):
    @property
    def rate(self):
        return 0.5 if self.training else 0.0

    def forward(self, x):
        return F.dropout(x, self.rate)


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class Decorated(nn.Module):
    @decorated
    def forward(self, x):
        return [F.dropout(each, training=self.training) for each in x]


class Elsewhere(nn.Module):
    """What is told the mode by its caller, or only reads it outside of forward, does the same in both."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=False)

    def extra_repr(self):
        return f"training={self.training}"


@pytest.mark.parametrize(
    "kind",
    [
        nn.Dropout2d,
        nn.AlphaDropout,
        nn.BatchNorm1d,
        nn.SyncBatchNorm,
        nn.InstanceNorm2d,
        nn.RReLU,
        nn.MultiheadAttention,
        nn.LSTM,
        nn.GRU,
        torchvision.ops.StochasticDepth,
        DrawnBlock,
        InForward,
        Inherits,
        InMethod,
        InProperty,
        Decorated,
    ],
)
def test_classes_whose_mode_matters(kind):
    assert depends_on_mode(kind)


@pytest.mark.parametrize(
    "kind",
    [
        nn.Linear,
        nn.Conv2d,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.GELU,
        nn.Sequential,
        nn.ModuleList,
        nn.Embedding,
        torchvision.models.ResNet,
        Block,
        ResidualChain,
        Parallel,
        LinearCombination,
        Elsewhere,
    ],
)
def test_classes_that_compute_the_same_in_both_modes(kind):
    assert not depends_on_mode(kind)


class Model(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.inp, self.part, self.out = nn.Linear(5, 4), part, nn.Linear(4, 3)

    def forward(self, x):
        x = self.inp(x)
        return self.out(x + self.part(x))


def test_the_part_is_named_and_nothing_has_run():
    model, x = Model(nn.Sequential(nn.Linear(4, 4), nn.RReLU())), torch.ones(2, 5)
    message = r"model: got .RReLU 'part.1' in training mode.; allowed: a model in eval mode\. Call model.eval\(\) first"
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.unravel(model, x)
    chain = ResidualChain(nn.Linear(5, 4), [Block(InForward(), nn.Identity())], nn.Linear(4, 3))
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got .InForward 'blocks.0.branch' in training mode"):
        rp.block_norms(chain, x)
    with pytest.raises(rp.ResnetPathsError, match=r"module: got 'InForward in training mode'"):
        forward_cost(InForward(), x)
    norm = nn.BatchNorm1d(5)
    with pytest.raises(rp.ResnetPathsError, match=r"module: got 'BatchNorm1d in training mode'.*module.eval\(\)"):
        forward_cost(norm, x)
    assert norm.num_batches_tracked == 0
    # No mode has been set here, and none is needed.
    assert len(rp.unravel(Model(nn.Linear(4, 4)), x)) == 1

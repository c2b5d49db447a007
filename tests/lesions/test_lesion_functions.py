"""Steps as functions: every number that of the module, inputs untouched, fewer tensors made."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Constant, LinearCombination, Parallel
from resnet_paths.core.placement import place_modules
from resnet_paths.lesions.functions import step_function
from resnet_paths.zoo import build_network
from tests.chains import inputs, plans, random_chain
from tests.core.test_folding import exported
from tests.gradients.gradient_reference import seeded

NETWORKS = [
    "preact-resnet-20",
    "resnet-20",
    "plain-20",
    "vgg-15",
    "se-resnet-20",
    "densenet-40-k8",
    "highway-50",
    "vit-small",
]


@functools.cache
def unraveled(name):
    model = build_network(name, torch.Generator().manual_seed(0)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1
            module.bias.data += 0.1
    return rp.unravel(model, torch.zeros(2, 1, 28, 28))


def assert_same(step, x):
    """The function of a step gives what the step gives, and leaves its input as it was."""
    given = [part.clone() for part in (x if isinstance(x, tuple) else (x,))]
    found, wanted = step_function(step, {})(x), step(tuple(given) if isinstance(x, tuple) else given[0])
    for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (found, wanted)), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    now = x if isinstance(x, tuple) else (x,)
    assert all(map(torch.equal, now, given))
    return wanted


@pytest.mark.parametrize("name", NETWORKS)
def test_every_step_of_exported_networks_bit_for_bit(name):
    chain = unraveled(name)
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        state = chain.stem(x)
        for block in (*chain, chain.head):
            state = assert_same(block, state)


@pytest.mark.parametrize("placement", [{"channels_last": True}, {"precision": "bfloat16"}, {"fold_batchnorm": True}])
@pytest.mark.parametrize("name", ["preact-resnet-20", "resnet-20"])
def test_in_other_layouts_and_precisions(name, placement):
    (chain,) = place_modules([unraveled(name)], **placement)
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    if "precision" in placement:
        x = x.bfloat16()
    with torch.inference_mode():
        state = chain.stem(x.contiguous(memory_format=torch.channels_last))
        for block in (*chain, chain.head):
            state = assert_same(block, state)


@settings(max_examples=30, deadline=None)
@given(plans(min_blocks=1))
def test_chains_made_by_hand(plan):
    chain = random_chain(plan)
    with torch.inference_mode():
        assert_same(ResidualChain(nn.Identity(), chain, chain.head), chain.stem(inputs()))


class Written(nn.Module):
    """Whatever a test writes down."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


def traced(function, *parts):
    """A part as unraveling makes it: an exported graph."""
    return exported(Written(function, *parts), example=torch.zeros(2, 4, dtype=torch.float64))[1]


def linear():
    with seeded():
        return nn.Linear(4, 4).double()


BRANCHES = {
    "read twice": lambda: traced(lambda x, f: (lambda y: F.relu(y) - y)(f(x)), linear()),
    "of the input": lambda: traced(lambda x, f: f(F.relu(x)) + F.silu(x), linear()),
    "of a view of the input": lambda: traced(lambda x, f: f(F.relu(x.view(-1, 2, 2)).flatten(1)), linear()),
    "ends in a view": lambda: traced(lambda x, f: f(x).view(-1, 2, 2).flatten(1), linear()),
    "one after the other": lambda: traced(lambda x, f: F.gelu(F.silu(F.relu(f(x)))), linear()),
    "tanh": lambda: traced(lambda x, f: F.gelu(f(x), approximate="tanh"), linear()),
    "relu6": lambda: traced(lambda x, f: F.hardswish(F.relu6(f(x))), linear()),
    "returns its input": lambda: nn.Identity(),
    "constant": lambda: Constant(torch.arange(4.0).double()),
    "scaled": lambda: LinearCombination([traced(lambda x, f: F.relu(f(x)), linear())], [0.3]),
    "parallel": lambda: Parallel([traced(lambda x, f: F.relu(f(x)), linear()) for _ in range(2)]),
    "parallel, onto the skip": lambda: Parallel([linear(), linear()], onto_skip=True),
    "chain": lambda: ResidualChain(nn.Identity(), [Block(linear(), nn.Identity())], nn.ReLU()),
}


@pytest.mark.parametrize("post", [None, "relu"])
@pytest.mark.parametrize("skip", ["identity", "view", "linear", "none"])
@pytest.mark.parametrize("kind", BRANCHES)
def test_blocks_of_every_form(kind, skip, post):
    skips = {
        "identity": nn.Identity(),
        "view": traced(lambda x: x.view(-1, 2, 2).flatten(1)),
        "linear": linear(),
        "none": None,
    }
    after = None if post is None else traced(F.relu)
    block = Block(BRANCHES[kind](), skips[skip], post=after).eval()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.inference_mode():
        assert_same(block, x)
        if skips[skip] is not None:
            assert_same(block.replace(branch=None), x)
        assert_same(block.replace(pre=traced(F.relu)), x)


def test_a_part_with_hooks_runs_as_it_is():
    chain = unraveled.__wrapped__("preact-resnet-20")  # one that no other test uses
    x = chain.stem(torch.randn(2, 1, 28, 28))
    calls = []
    chain[1].branch.register_forward_hook(lambda *_: calls.append("branch"))
    chain[2].register_forward_pre_hook(lambda *_: calls.append("block"))
    with torch.inference_mode():
        for block in chain:
            x = step_function(block, {})(x)
    assert calls == ["branch", "block"]


class Made(TorchDispatchMode):
    """Counts operations that made a tensor, and those that wrote over one."""

    def __init__(self):
        super().__init__()
        self.new = self.over = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.over += func._schema.is_mutable
        self.new += not func._schema.is_mutable
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "over"), [("preact-resnet-20", 3), ("resnet-20", 3)])
def test_what_can_be_written_over_is(name, over):
    chain = unraveled(name)
    step = step_function(chain[1], {})
    with torch.no_grad():
        state = chain.stem(torch.randn(2, 1, 28, 28))
        with Made() as made:
            step(state)
        with Made() as plain:
            chain[1](state)
    # Two ReLUs and the addition: only what convolutions and BatchNorm make is new.
    assert (made.over, plain.over) == (over, 0)
    assert made.new == plain.new - over

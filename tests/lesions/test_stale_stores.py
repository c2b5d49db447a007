"""A store never answers for a model whose code or settings have changed, also where neither can be hashed."""

from __future__ import annotations

import functools

import pandas as pd
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.lesions.killed_studies import counts
from tests.lesions.test_lesions import labelled

FACTOR = 2.0
TABLE = {"factor": 2.0}
LIST = [2.0]
TENSOR = torch.tensor(2.0, dtype=torch.float64)
ARRAY = TENSOR.numpy()


class Config:
    factor = 2.0

    def __init__(self):
        self.own = 2.0


CONFIG = Config()


def multiplied(x):
    return x * 2.0


def times(x, factor):
    return x * factor


partial = functools.partial(times, factor=2.0)


class Written(nn.Module):
    """A branch that does what a function says."""

    by = 2.0
    functions = None

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.function = function
        self.config = Config()
        self.list = [2.0]

    def forward(self, x):
        return self.function(self, self.linear(x))


def made(function):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [
            Block(Written(function), nn.Identity(), name=f"b{i}", in_shape=(3,), out_shape=(3,)) for i in range(3)
        ]
        return ResidualChain(nn.Linear(5, 3), blocks, nn.Linear(3, 3)).double().eval()


def set_global(name, value):
    return lambda chain: globals().__setitem__(name, value)


def of_branches(change):
    return lambda chain: [change(block.branch) for block in chain]


WAYS = {
    "global number": (lambda m, x: x * FACTOR, set_global("FACTOR", 3.0)),
    "global dictionary": (lambda m, x: x * TABLE["factor"], lambda c: TABLE.update(factor=3.0)),
    "global list": (lambda m, x: x * LIST[0], lambda c: LIST.__setitem__(0, 3.0)),
    "global tensor": (lambda m, x: x * TENSOR, set_global("TENSOR", torch.tensor(3.0, dtype=torch.float64))),
    "global tensor in place": (lambda m, x: x * TENSOR, lambda c: TENSOR.add_(1)),
    "global array": (lambda m, x: x * float(ARRAY), lambda c: ARRAY.__iadd__(1)),
    "attribute of an object": (lambda m, x: x * CONFIG.own, lambda c: setattr(CONFIG, "own", 3.0)),
    "attribute of a class": (lambda m, x: x * CONFIG.factor, lambda c: setattr(Config, "factor", 3.0)),
    "function": (lambda m, x: multiplied(x), set_global("multiplied", lambda x: x * 3)),
    "class": (lambda m, x: x * Config.factor, set_global("Config", type("Config", (), {"factor": 3.0}))),
    "partial": (lambda m, x: partial(x), set_global("partial", functools.partial(times, factor=3.0))),
    "keywords of a partial": (lambda m, x: partial(x), lambda c: partial.keywords.update(factor=3.0)),
    "defaults": (lambda m, x: with_default(x), lambda c: setattr(with_default, "__defaults__", (3.0,))),
    "code": (lambda m, x: with_default(x), lambda c: setattr(with_default, "__code__", tripled.__code__)),
    "class attribute of the module": (lambda m, x: x * m.by, lambda c: setattr(Written, "by", 3.0)),
    "object of the module": (lambda m, x: x * m.config.own, of_branches(lambda m: setattr(m.config, "own", 3.0))),
    "list of the module": (lambda m, x: x * m.list[0], of_branches(lambda m: m.list.__setitem__(0, 3.0))),
    "other function": (lambda m, x: x * 2, of_branches(lambda m: setattr(m, "function", lambda m, x: x * 3))),
    "method": (lambda m, x: x * 2, lambda c: setattr(Written, "forward", lambda m, x: m.linear(x) * 3)),
    "hook": (lambda m, x: x * 2, of_branches(lambda m: m.register_forward_hook(lambda m, args, y: y * 1.5))),
    "global hook": (lambda m, x: x * 2, lambda c: HOOKS.append(hooked_everywhere())),
    "activation of torch": (
        lambda m, x: nn.functional.relu(x),
        lambda c: setattr(nn.functional, "relu", nn.functional.silu),
    ),
    "default of torch": (
        lambda m, x: x + (torch.zeros(1).dtype == torch.float64),
        lambda c: torch.set_default_dtype(torch.float64),
    ),
    "alias": (lambda m, x: alias(x), set_global("alias", torch.sin)),
    "hidden in a closure": (lambda m, x: counter(x), lambda c: counter.__closure__[0].cell_contents.append(1)),
}
HOOKS = []
alias = torch.tanh


def hooked_everywhere():
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * 1.5 if isinstance(module, Written) else None
    )


def with_default(x, factor=2.0):
    return x * factor


def tripled(x, factor=2.0):
    return x * factor * 1.5


def closing_over(values):
    return lambda x: x * (1 + len(values))


counter = closing_over([1])


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Everything that a way changes, as it was."""
    kept = {name: globals()[name] for name in ("FACTOR", "multiplied", "Config", "partial", "alias")}
    tensor, relu, forward = TENSOR, nn.functional.relu, Written.forward
    code, defaults = with_default.__code__, with_default.__defaults__
    yield
    globals().update(kept, TENSOR=tensor)
    tensor.fill_(2.0)
    TABLE.update(factor=2.0)
    LIST[0] = CONFIG.own = Config.factor = Written.by = 2.0
    Written.forward, nn.functional.relu = forward, relu
    with_default.__code__, with_default.__defaults__ = code, defaults
    partial.keywords.update(factor=2.0)
    counter.__closure__[0].cell_contents[:] = [1]
    torch.set_default_dtype(torch.float32)
    while HOOKS:
        HOOKS.pop().remove()


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_model_is_computed_again(way, tmp_path):
    function, change = WAYS[way]
    chain, loader = made(function), labelled(20)

    def study(**options):
        return rp.lesion_study(chain, loader, rp.single_deletions(chain), progress=False, **options)

    first = study(store=tmp_path)
    again = study(store=tmp_path)
    assert (counts(first), counts(again)) == ((3, 0), (0, 3))
    pd.testing.assert_frame_equal(first, again)
    change(chain)
    frame = study(store=tmp_path)
    assert counts(frame) == (3, 0)
    pd.testing.assert_frame_equal(frame, study())
    assert frame.cross_entropy.tolist() != first.cross_entropy.tolist()


def to_the_intact_outputs(outputs, labels, intact_outputs):
    return (outputs - intact_outputs).square().sum(1)


OF_INTACT = ("agreement", "kl_divergence", rp.measure(to_the_intact_outputs, key="1"))


def by_hand(intact, lesioned, loader):
    with torch.inference_mode():
        q, p = (torch.cat([network(x) for x, _ in loader]) for network in (intact, lesioned))
    return [
        (q.argmax(1) == p.argmax(1)).double().mean().item(),
        (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1).mean().item(),
        (p - q).square().sum(1).mean().item(),
    ]


@pytest.mark.parametrize("measure", range(3))
@pytest.mark.parametrize("exported", [False, True])
def test_measures_that_read_the_intact_network_are_of_the_intact_network_of_the_study(measure, exported, tmp_path):
    """Without its first block a network is the same before and after that block is trained, or deleted."""
    chain, loader = made(lambda m, x: torch.tanh(x)), labelled(20)
    if exported:
        chain = rp.unravel(chain, torch.randn(2, 5, dtype=torch.float64))
    without = rp.delete_block(chain, 0)

    def study(intact, lesion):
        frame = rp.lesion_study(
            intact, loader, [lesion], measures=[OF_INTACT[measure]], store=tmp_path, device="cpu", progress=False
        )
        value = frame[getattr(OF_INTACT[measure], "name", OF_INTACT[measure])].item()
        return counts(frame), value, by_hand(intact, without, loader)[measure]

    first, again = (study(chain, rp.Lesion("delete", (0,))) for _ in range(2))
    assert (first[0], again[0]) == ((3, 0), (0, 3))
    found, value, expected = study(without, rp.Lesion("delete", (0,)))
    assert value == pytest.approx(expected, abs=1e-12) == (1.0, 0.0, 0.0)[measure]
    assert found == (3, 0)
    with torch.no_grad():
        for parameter in chain[0].branch.parameters():
            parameter.mul_(-4)
    found, value, expected = study(chain, rp.Lesion("delete", (0,)))
    assert value == pytest.approx(expected, abs=1e-12)
    assert found == (3, 0)
    assert value != pytest.approx(first[1])

"""Fingerprints: equal for what computes the same thing, different for all else, never an error."""

from __future__ import annotations

import collections
import copy
import decimal
import functools
import io
import itertools
import math
import operator
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resnet_paths as rp
from resnet_paths._utils.fingerprint import fingerprint
from resnet_paths.core.parts import Constant, Parallel, Scaled
from resnet_paths.lesions.trie import chain_key
from tests.chains import Plan, inputs, plans, random_chain, random_model

STEADY = (3, tuple(Plan(3, "identity", False, False) for _ in range(3)))


@pytest.fixture(scope="module")
def exported():
    return rp.unravel(random_model(STEADY), inputs())


class Net(nn.Module):
    """A module with whatever attributes a test gives it."""

    def __init__(self, **attributes):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.zeros_(self.layer.bias)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.layer(x)


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Holder:
    def __init__(self, value):
        self.value = value


def closing_over(value):
    return lambda x: x * value


def with_default(value):
    def multiply(x, by=value):
        return x * by

    return multiply


Pair = collections.namedtuple("Pair", "one other")

DIFFERENT = {
    "float": (0.5, 0.25),
    "float and int": (1.0, 1),
    "bool and int": (True, 1),
    "negative zero": (0.0, -0.0),
    "str": ("same", "valid"),
    "str and bytes": ("a", b"a"),
    "tuple": ((1, 2), (1, 3)),
    "tuple and list": ((1, 2), [1, 2]),
    "nesting": ([[1], 2], [[1, 2]]),
    "list of tensors": ([torch.ones(2)], [torch.zeros(2)]),
    "dict value": ({"a": 1}, {"a": 2}),
    "dict key": ({"a": 1}, {"b": 1}),
    "dict order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "set": ({1, 2}, {1, 3}),
    "tensor": (torch.tensor([1.0]), torch.tensor([2.0])),
    "tensor dtype": (torch.tensor([1.0]), torch.tensor([1.0]).double()),
    "tensor shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "bfloat16": (torch.ones(2).bfloat16(), torch.zeros(2).bfloat16()),
    "sparse": (torch.eye(2).to_sparse(), torch.zeros(2, 2).to_sparse()),
    "conjugated": (torch.tensor([1j]), torch.tensor([1j]).conj()),
    "array": (np.ones(2), np.zeros(2)),
    "array of objects": (np.array([{"a": 1}, None]), np.array([{"a": 2}, None])),
    "numpy number": (np.float32(1), np.float32(2)),
    "dtype": (torch.float32, torch.float64),
    "lambda body": (lambda x: x * 2, lambda x: x * 3),
    "lambda operation": (lambda x: x + 2, lambda x: x * 2),
    "nested lambda": (lambda: lambda x: x * 2, lambda: lambda x: x * 3),
    "method called": (lambda x: x.tanh(), lambda x: x.relu()),
    "closure": (closing_over(2), closing_over(3)),
    "closed over tensor": (closing_over(torch.ones(2)), closing_over(torch.zeros(2))),
    "default": (with_default(2), with_default(3)),
    "partial": (functools.partial(torch.add, 1), functools.partial(torch.add, 2)),
    "partial of a keyword": tuple(functools.partial(nn.functional.softmax, dim=d) for d in (0, 1)),
    "function of torch": (torch.relu, torch.tanh),
    "functional of torch": (nn.functional.relu, nn.functional.silu),
    "operation": (torch.ops.aten.relu.default, torch.ops.aten.tanh.default),
    "operation packet": (torch.ops.aten.relu, torch.ops.aten.tanh),
    "ufunc": (np.tanh, np.sin),
    "builtin": (operator.add, operator.mul),
    "bound builtin": (torch.ones(2).add, torch.zeros(2).add),
    "bound method": (Holder(1).__init__, Holder(2).__init__),
    "class": (nn.ReLU, nn.Tanh),
    "object": (Holder(1), Holder(2)),
    "slots": (Slots(1), Slots(2)),
    "deep inside": (Holder([{"a": Slots((1, torch.ones(1)))}]), Holder([{"a": Slots((1, torch.zeros(1)))}])),
    "deque": (collections.deque([1]), collections.deque([2])),
    "defaultdict": (collections.defaultdict(int, a=1), collections.defaultdict(int, a=2)),
    "namedtuple": (Pair(1, 2), Pair(1, 3)),
    "pattern": (re.compile("a"), re.compile("b")),
    "decimal": (decimal.Decimal("1.5"), decimal.Decimal("2.5")),
    "itemgetter": (operator.itemgetter(1), operator.itemgetter(2)),
    "bytearray": (bytearray(b"a"), bytearray(b"b")),
    "path": (Path("a"), Path("b")),
    "module in a list": ([nn.ReLU()], [nn.Tanh()]),
    "module": (nn.ReLU(), nn.Tanh()),
    "leaky": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    "mode": (nn.Dropout().train(), nn.Dropout().eval()),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_changed_attribute_changes_it(name):
    one, other = DIFFERENT[name]
    assert fingerprint(Net(a=one)) != fingerprint(Net(a=other))
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(Net(a=one)) == fingerprint(Net(a=one))


def test_parameters_buffers_and_structure_count():
    chain = random_chain(STEADY)
    before = fingerprint(chain)
    for tensor in [*chain.parameters()]:
        with torch.no_grad():
            flat = tensor.view(-1)
            kept, flat[-1] = flat[-1].item(), torch.nextafter(flat[-1], torch.tensor(9.0, dtype=torch.float64))
            assert fingerprint(chain) != before
            flat[-1] = kept
    assert fingerprint(chain) == before
    linear, relu = nn.Linear(2, 2), nn.ReLU()
    orders = [nn.Sequential(*order) for order in itertools.permutations([linear, relu, nn.Tanh()])]
    assert len({fingerprint(o) for o in orders}) == 6
    assert fingerprint(nn.Sequential(linear, relu)) != fingerprint(nn.Sequential(nn.Sequential(linear, relu)))
    assert len({fingerprint(p) for p in (linear, Scaled(linear, 1.0), Scaled(linear, 0.5), Parallel([linear]))}) == 4
    assert fingerprint(Constant(torch.ones(2))) != fingerprint(Constant(torch.zeros(2)))


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_count_also_those_that_are_not_saved(persistent):
    def made(value):
        module = Net()
        module.register_buffer("table", torch.tensor([value]), persistent=persistent)
        return module

    assert fingerprint(made(1.0)) == fingerprint(made(1.0)) != fingerprint(made(2.0))
    norms = [nn.BatchNorm1d(2).eval() for _ in range(2)]
    norms[1].running_var += 1
    assert fingerprint(norms[0]) != fingerprint(norms[1])


def module_from(code):
    """The class Made of a file, as if it were imported."""
    namespace = {"__name__": "users_file"}
    exec(f"import torch\nfrom torch import nn\n{code}", namespace)
    return namespace["Made"]()


FORWARD = "    def forward(self, x):\n        return "
MADE = "class Made(nn.Module):\n"
BODIES = [
    f"{MADE}{FORWARD}x * N",
    f"{MADE}    def forward(self, x, by=N):\n        return x * by",
    f"{MADE}    by = N\n{FORWARD}x * self.by",
    f"{MADE}    @property\n    def by(self):\n        return N\n{FORWARD}x * self.by",
    f"{MADE}    @staticmethod\n    def f(x):\n        return x * N\n{FORWARD}self.f(x)",
    f"{MADE}    @classmethod\n    def f(cls, x):\n        return x * N\n{FORWARD}self.f(x)",
    f"class Base(nn.Module):\n    def f(self, x):\n        return x * N\nclass Made(Base):\n{FORWARD}self.f(x)",
    f"def f(x):\n    return x * N\n{MADE}{FORWARD}f(x)",
    f"BY = N\n{MADE}{FORWARD}x * BY",
    f"BY = N\ndef f(x):\n    return (lambda y: y * BY)(x)\n{MADE}{FORWARD}f(x)",
]


def test_the_code_of_a_class_counts():
    codes = [re.sub(r"\bN\b", str(n), body) for body in BODIES for n in (2, 3)]
    assert len({fingerprint(module_from(code)) for code in codes}) == len(codes)
    for code in codes:
        assert fingerprint(module_from(code)) == fingerprint(module_from(f"\n\n# the same, further down\n{code}"))
    documented = (
        BODIES[0].replace("        return", '        """What it does."""\n        return').replace("x * N", "x * 2")
    )
    assert fingerprint(module_from(documented)) == fingerprint(module_from(documented.replace("What", "All that")))


def test_hooks_count_but_not_how_many_were_registered_before():
    plain, hooked, again, other, before = (Net() for _ in range(5))
    hooked.register_forward_hook(closing_over(2))
    Net().register_forward_hook(closing_over(5))
    again.register_forward_hook(closing_over(2))
    other.register_forward_hook(closing_over(3))
    before.register_forward_pre_hook(closing_over(2))
    prints = [fingerprint(m) for m in (plain, hooked, other, before)]
    assert len(set(prints)) == 4
    assert fingerprint(again) == fingerprint(hooked)
    with_kwargs = Net()
    with_kwargs.register_forward_hook(closing_over(2), with_kwargs=True)
    assert fingerprint(with_kwargs) != fingerprint(hooked)


def on(device, function=torch.add):
    """A graph with a device in it."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.arange, (3,), {"device": torch.device(device)})
    graph.output(graph.call_function(function, (x, made)))
    return torch.fx.GraphModule({}, graph)


def test_a_graph_counts_by_its_operations_and_submodules(exported):
    same, other = (rp.unravel(random_model(STEADY, seed), inputs()) for seed in (0, 1))
    assert fingerprint(same) == fingerprint(exported) != fingerprint(other)
    traced = [torch.fx.symbolic_trace(nn.Sequential(act)) for act in (nn.ReLU(), nn.ReLU(), nn.Tanh())]
    assert fingerprint(traced[0]) == fingerprint(traced[1]) != fingerprint(traced[2])
    assert fingerprint(on("cpu")) == fingerprint(on("cuda:1")) != fingerprint(on("cpu", torch.sub))
    assert fingerprint(on("cpu", lambda x, y: x * y)) != fingerprint(on("cpu", lambda x, y: x / y))


@settings(max_examples=20, deadline=None)
@given(plans(max_blocks=4), st.integers(0, 3))
def test_copies_of_any_chain_have_the_same(plan, seed):
    chain = random_chain(plan, seed)
    before = fingerprint(chain)
    assert fingerprint(random_chain(plan, seed)) == before
    assert fingerprint(copy.deepcopy(chain)) == before
    assert fingerprint(pickle.loads(pickle.dumps(chain))) == before
    saved = io.BytesIO()
    torch.save(chain, saved)
    saved.seek(0)
    assert fingerprint(torch.load(saved, weights_only=False)) == before
    narrow = copy.deepcopy(chain).float()
    kept = fingerprint(narrow)
    assert kept != before
    assert fingerprint(narrow.double().float()) == kept
    assert fingerprint(random_chain(plan, seed + 1)) != before


def keys(chains):
    """As those of a study's lesions in its store."""
    return [fingerprint(chain_key(chain, fingerprint)) for chain in chains]


def test_copies_of_an_exported_chain_have_the_same(exported):
    before = fingerprint(exported)
    assert fingerprint(copy.deepcopy(exported)) == before
    assert fingerprint(pickle.loads(pickle.dumps(exported))) == before
    lesioned = [rp.delete_block(exported, 1), rp.swap_blocks(exported, 0, 1)]
    assert keys(pickle.loads(pickle.dumps(lesioned))) == keys(lesioned)


def test_lesions_of_one_kind_have_one_key():
    chain = random_chain(STEADY)
    same = [rp.delete_block(chain, 1), rp.delete_blocks(chain, [1]), rp.delete_block(copy.deepcopy(chain), "block1")]
    assert len(set(keys(same))) == 1
    edits = [
        chain,
        same[0],
        rp.delete_block(chain, 2),
        rp.swap_blocks(chain, 0, 1),
        rp.scale_block(chain, 0, 0.5),
        rp.scale_block(chain, 0, 0.25),
        rp.duplicate_block(chain, 0),
        rp.parallel_blocks(chain, [0, 1]),
        rp.parallel_blocks(chain, [0, 1], combine="sum"),
        chain.with_head(nn.Linear(3, 3).double()),
    ]
    assert len(set(keys(edits))) == len(edits)


SCRIPT = """
import torch, resnet_paths as rp
from tests.chains import inputs, random_chain, random_model
from tests.utils.test_fingerprint import DIFFERENT, STEADY, Net, fingerprint
for _ in range(3): Net().register_forward_hook(print)
print(fingerprint(random_chain(STEADY)), fingerprint(rp.unravel(random_model(STEADY), inputs())))
print(*(fingerprint(Net(a=one)) for one, _ in DIFFERENT.values()))
"""


@pytest.mark.slow
def test_the_same_in_another_process(exported):
    here = [fingerprint(random_chain(STEADY)), fingerprint(exported)]
    here += [fingerprint(Net(a=one)) for one, _ in DIFFERENT.values()]
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )
    assert there.stdout.split() == here


def test_what_holds_itself():
    def ring(value):
        one, other = Holder(value), Holder(None)
        one.other, other.other = other, one
        return Net(a=[one])

    assert fingerprint(ring(1)) == fingerprint(ring(1)) != fingerprint(ring(2))
    looped = [1]
    looped.append(looped)
    assert len({fingerprint(looped), fingerprint([2, looped]), fingerprint([1])}) == 3

    def family(value):
        parent = Net()
        parent.children_ = nn.ModuleList(Net(value=value, parent=[parent]) for _ in range(3))
        return parent

    known = {}
    assert fingerprint(family(1), known=known) == fingerprint(family(1)) != fingerprint(family(2))
    # A child's digest depends on where the walk began: it is not kept for others.
    parent = family(1)
    kept = {}
    fingerprint(parent, known=kept)
    assert id(parent) in kept
    assert id(parent.children_[1]) not in kept
    method = Net()
    method.act = method.forward
    assert fingerprint(method) == fingerprint(copy.deepcopy(method))


def test_many_objects_that_know_each_other_take_no_time():
    def crowd(value):
        everyone = [Holder(i) for i in range(60)]
        for person in everyone:
            person.others = everyone
        everyone[-1].value = value
        return everyone

    assert fingerprint(crowd(1)) == fingerprint(crowd(1)) != fingerprint(crowd(2))
    shared = [0]
    for _ in range(60):
        shared = [shared, shared]
    assert fingerprint(shared)


class Odd:
    def __reduce_ex__(self, protocol):
        raise ValueError("never")

    def __repr__(self):
        raise ValueError("never")


ODD = [
    threading.Lock(),
    (i for i in range(3)),
    iter([1]),
    io.StringIO("a"),
    math,
    np,
    torch,
    sys,
    Odd(),
    object(),
    memoryview(b"a"),
    torch.zeros(3, device="meta"),
    torch.Generator(),
    functools.lru_cache(len),
    print,
    type,
    Ellipsis,
    NotImplemented,
    float("nan"),
    threading.current_thread(),
    staticmethod(len),
    property(len),
    super,
    {1: {2: {}}},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_odd_attributes_are_no_error(odd):
    assert fingerprint(Net(a=odd)) == fingerprint(Net(a=odd)) != fingerprint(Net())


def test_known_digests_are_used_again():
    module = Net()
    known = {}
    first = fingerprint(module, known=known)
    assert set(map(id, [module, module.layer])) <= set(known)
    with torch.no_grad():
        module.layer.weight += 1  # not to be done while `known` is used
    assert fingerprint(module, known=known) == first != fingerprint(module)

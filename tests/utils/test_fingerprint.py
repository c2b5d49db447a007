"""Fingerprints: equal for what computes the same thing on any machine, different for other values and weights."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resnet_paths as rp
from resnet_paths._utils.fingerprint import fingerprint, is_determined
from resnet_paths.core.parts import Constant, LinearCombination, Parallel
from resnet_paths.lesions.keys import computes_what_it_says, network_key
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
    "tensor": (torch.tensor([1.0]), torch.tensor([2.0])),
    "tensor dtype": (torch.tensor([1.0]), torch.tensor([1.0]).double()),
    "tensor shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "bfloat16": (torch.ones(2).bfloat16(), torch.zeros(2).bfloat16()),
    "sparse": (torch.eye(2).to_sparse(), torch.zeros(2, 2).to_sparse()),
    "conjugated": (torch.tensor([1j]), torch.tensor([1j]).conj()),
    "array": (np.ones(2), np.zeros(2)),
    "numpy number": (np.float32(1), np.float32(2)),
    "dtype": (torch.float32, torch.float64),
    "function of torch": (torch.relu, torch.tanh),
    "operation": (torch.ops.aten.relu.default, torch.ops.aten.tanh.default),
    "operation packet": (torch.ops.aten.relu, torch.ops.aten.tanh),
    "module in a list": ([nn.ReLU()], [nn.Tanh()]),
    "module": (nn.ReLU(), nn.Tanh()),
    "leaky": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_values_have_another(name):
    one, other = DIFFERENT[name]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))


@pytest.mark.parametrize("name", ["float", "str", "tuple", "dtype"])
def test_plain_attributes_of_modules_count(name):
    one, other = DIFFERENT[name]
    assert fingerprint(Net(a=one)) != fingerprint(Net(a=other))
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
    scaled = [LinearCombination([linear], [factor]) for factor in (1.0, 0.5)]
    assert len({fingerprint(part) for part in (linear, *scaled, Parallel([linear]))}) == 4
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
    return [network_key(chain, {}) for chain in chains]


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
from tests.utils.test_fingerprint import DIFFERENT, STEADY, fingerprint
print(fingerprint(random_chain(STEADY)), fingerprint(rp.unravel(random_model(STEADY), inputs())))
print(*(fingerprint(one) for one, _ in DIFFERENT.values()))
"""


@pytest.mark.slow
def test_the_same_in_another_process(exported):
    here = [fingerprint(random_chain(STEADY)), fingerprint(exported)]
    here += [fingerprint(one) for one, _ in DIFFERENT.values()]
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
    )
    assert there.stdout.split() == here


def test_other_kinds_of_values_are_refused():
    for value in ({1, 2}, object(), torch.Generator(), np.array([None])):
        with pytest.raises(rp.ResnetPathsError, match=r"^value: got .*; allowed: numbers, strings, tensors, modules"):
            fingerprint([value])


def test_only_what_was_exported_says_all_that_it_computes(exported):
    assert computes_what_it_says(exported)
    assert computes_what_it_says(rp.scale_block(rp.delete_block(exported, 1), 0, 0.5))
    assert not computes_what_it_says(random_chain(STEADY))
    assert not computes_what_it_says(exported.with_head(nn.Sequential(exported.head)))
    assert not is_determined(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    hooked = copy.deepcopy(exported)
    hooked[0].branch.register_forward_hook(lambda *_: None)
    assert not computes_what_it_says(hooked)


def test_known_digests_are_used_again():
    module = Net()
    known = {}
    first = fingerprint(module, known=known)
    assert set(map(id, [module, module.layer])) <= set(known)
    with torch.no_grad():
        module.layer.weight += 1  # not to be done while `known` is used
    assert fingerprint(module, known=known) == first != fingerprint(module)

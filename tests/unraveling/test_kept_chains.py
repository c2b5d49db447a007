"""Chains kept in a folder (`cache=`): used where nothing has changed, and nowhere else."""

import functools
import json
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torchvision
from torch import nn

import resnet_paths as rp
from resnet_paths import unraveling
from resnet_paths._utils import reached
from resnet_paths._utils.fingerprint import fingerprint
from resnet_paths.core.signature import Signature
from resnet_paths.unraveling import kept
from resnet_paths.unraveling.kept import Kept
from resnet_paths.unraveling.records import Unwritable, read_chain, write_chain
from tests.unraveling.networks import draw

SCALE = 1.0


def bend(x):
    return torch.tanh(x) * SCALE


class Block(nn.Module):
    slope = 1.0

    def __init__(self, width=6):
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.options = {"gain": 1.0}
        self.activation = functools.partial(bend)

    def inner(self, x):
        return self.two(self.activation(self.one(x)))

    def forward(self, x):
        return x + self.slope * self.options["gain"] * self.inner(x)


class Net(nn.Module):
    def __init__(self, width=6, depth=2):
        super().__init__()
        self.register_buffer("offset", torch.zeros(width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(x + self.offset) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=x.dtype)


def net(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**settings).double().eval()


def key(model=None, example=None, **changes):
    example = draw(2, 6) if example is None else example
    args = example if isinstance(example, tuple) else (example,)
    signature, tensors = Signature.of(args, changes.pop("keywords", {}))
    return Kept("folder", net() if model is None else model, signature, tensors, list(changes.items())).key


@pytest.fixture
def traces(monkeypatch):
    """How often a model was exported."""
    calls = []
    original = unraveling.trace
    monkeypatch.setattr(unraveling, "trace", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    return calls


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, and the file of its chain."""
    folder, model = tmp_path_factory.mktemp("cache"), net()
    rp.unravel(model, draw(2, 6), cache=folder)
    (path,) = folder.iterdir()
    return model, path, path.read_text()


def same_chain(one, other):
    assert fingerprint(one) == fingerprint(other)
    assert one.summary() == other.summary()
    assert [b.name for b in one] == [b.name for b in other]
    assert one.stem.sizes == other.stem.sizes
    assert [type(m).__name__ for m in one.modules()] == [type(m).__name__ for m in other.modules()]
    assert all(a.training == b.training for a, b in zip(one.modules(), other.modules(), strict=True))
    assert [(b.skip_kind, b.stage, b.in_shape, b.out_shape, b.pre_stays, b.reads_context) for b in one] == [
        (b.skip_kind, b.stage, b.in_shape, b.out_shape, b.pre_stays, b.reads_context) for b in other
    ]
    assert all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_second_model_of_the_same_code_is_not_exported(tmp_path, traces):
    model, x = net(), draw(2, 6)
    first = rp.unravel(model, x, cache=tmp_path)
    assert len(traces) == 1
    same_chain(first, rp.unravel(model, x, cache=tmp_path))
    other = net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    chain = rp.unravel(other, draw(2, 6, seed=1), cache=tmp_path)
    assert len(traces) == 1
    torch.testing.assert_close(chain(draw(3, 6)), other(draw(3, 6)))
    assert chain.blocks[0].branch is not None
    assert {id(p) for p in chain.parameters()} == {id(p) for p in other.parameters()}
    other.blocks[0].one.weight = nn.Parameter(other.blocks[0].one.weight.detach().clone())
    with pytest.raises(rp.ResnetPathsError, match="was replaced"):
        chain(x)


def patched_method(monkeypatch):
    monkeypatch.setattr(Block, "inner", lambda self, x: self.one(x))
    return net()


def patched_helper(monkeypatch):
    monkeypatch.setitem(globals(), "bend", lambda x: torch.sigmoid(x))
    return net()


def patched_constant(monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    return net()


def patched_class_attribute(monkeypatch):
    monkeypatch.setattr(Block, "slope", 0.5)
    return net()


def patched_forward_of_torch(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)
    return net()


def other_configuration(_):
    model = net()
    model.blocks[1].options["gain"] = 2.0
    return model


def other_function(_):
    model = net()
    model.blocks[0].activation = functools.partial(torch.relu)
    return model


def other_forward_of_one(_):
    model = net()
    model.blocks[0].forward = types.MethodType(lambda self, x: x + self.one(x), model.blocks[0])
    return model


def other_class(_):
    model = net()
    model.blocks[0].__class__ = type("Block", (Block,), {"forward": lambda self, x: x + self.two(x)})
    return model


def other_closure(_):
    model = net()

    def scaled(factor):
        return lambda x: factor * x

    model.blocks[0].activation = scaled(2.0)
    return model


def other_default(_):
    model = net()

    def scaled(x, factor=2.0):
        return factor * x

    model.blocks[0].activation = scaled
    return model


def tied_weights(_):
    model = net()
    model.blocks[1].one.weight = model.blocks[0].one.weight
    return model


def other_order(_):
    model = net()
    model.blocks[0].one, model.blocks[0].two = model.blocks[0].two, model.blocks[0].one
    model.blocks[0]._modules = dict(reversed(model.blocks[0]._modules.items()))
    return model


def constant_in_a_list(_):
    model = net()
    model.table = [torch.ones(3)]
    return model


CHANGES = [
    *(patched_method, patched_helper, patched_constant, patched_class_attribute, patched_forward_of_torch),
    *(other_configuration, other_function, other_forward_of_one, other_class, other_closure, other_default),
    *(tied_weights, other_order, constant_in_a_list),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_has_another_key(change, monkeypatch):
    before = key()
    assert key() == before
    assert key(change(monkeypatch)) != before


def test_each_pair_of_changes_differs():
    def with_factor(factor):
        model = net()
        model.blocks[0].activation = lambda x: factor * x
        return model

    def with_table(value):
        model = net()
        model.table = [torch.full((3,), value)]
        return model

    assert key(with_factor(1.0)) != key(with_factor(2.0))
    assert key(with_factor(2.0)) == key(with_factor(2.0))
    assert key(with_table(1.0)) != key(with_table(2.0))


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (net(width=7), None),
        (net(depth=3), None),
        (net().float(), None),
        (net().train(), None),
        (net(), draw(3, 6)),
        (net(), draw(2, 4, 6)),
        (net(), draw(2, 6).float()),
        (net(), (draw(2, 6), True)),
    ],
)
def test_other_shapes_dtypes_and_arguments_have_another_key(model, example):
    assert key(model, example) != key()


def test_other_versions_options_and_settings_have_another_key(monkeypatch):
    keys = {key(), key(output=1), key(max_depth=0), key(keywords={"mask": draw(2, 6)})}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        keys.add(key())
    with monkeypatch.context() as patch:
        patch.setattr(reached.platform, "python_version", lambda: "2.7")
        keys.add(key())
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_own_code", lambda: "another version")
        keys.add(key())
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(key())
    assert len(keys) == 8


def test_versions_of_installed_packages_count(monkeypatch):
    model = torchvision.models.resnet18(weights=None).eval()
    before = key(model)
    monkeypatch.setattr(torchvision, "__version__", "0.0")
    assert key(model) != before


def test_weights_state_of_calls_and_silent_hooks_do_not_count(tmp_path, traces):
    model, x = net(), draw(2, 6)
    rp.unravel(model, x, cache=tmp_path)
    stored: list[object] = []
    model.blocks[0].register_forward_hook(lambda *values: stored.append(values[-1]))
    model(x)
    rp.unravel(model, x, cache=tmp_path)
    assert len(traces) == 1
    model.blocks[0].register_forward_hook(lambda _, __, output: 2 * output)
    chain = rp.unravel(model, x, cache=tmp_path)
    assert len(traces) == 2
    torch.testing.assert_close(chain(x), model(x))


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign"])
def test_damaged_and_foreign_files_are_written_again(written, traces, damage):
    model, path, whole = written
    foreign = json.dumps(json.loads(whole) | {"key": "0" * 64})
    path.write_text({"cut": whole[:-20], "changed": whole.replace("tanh", "sinh"), "foreign": foreign}[damage])
    with pytest.warns(UserWarning, match="cannot be read and is written again"):
        rp.unravel(model, draw(2, 6), cache=path.parent, verify=False)
    assert len(traces) == 1
    assert path.read_text() == whole
    assert list(path.parent.iterdir()) == [path]


def test_a_graph_that_is_not_the_models_is_found_by_its_output(written, traces):
    model, path, whole = written
    changed = json.loads(whole.replace("tanh", "sinh"))
    changed["checksum"] = kept._checksum(changed["record"])
    path.write_text(json.dumps(changed))
    with pytest.warns(UserWarning, match="the chain that was kept is not the model's, which is exported again"):
        chain = rp.unravel(model, draw(2, 6), cache=path.parent, verify=False)
    assert len(traces) == 1
    assert path.read_text() == whole
    torch.testing.assert_close(chain(draw(2, 6)), model(draw(2, 6)))


def test_records_hold_no_code(written):
    model, _, whole = written
    text = json.dumps(json.loads(whole)["record"])
    torch.testing.assert_close(read_chain(json.loads(text), model, None)(draw(2, 6)), model(draw(2, 6)))
    for old, new in [
        ("aten.tanh.default", "load_library.x.y"),
        ("aten.tanh.default", "operator.methodcaller"),
        ("aten.tanh.default", "builtins.eval"),
        ('"tanh"', '"tanh = print()\\n    x"'),
        ('"kind": "identity"', '"kind": "function"'),
        ('"blocks.0.one.weight"', '"blocks.0.one.forward"'),
    ]:
        assert old in text
        with pytest.raises((ValueError, TypeError, AttributeError)):
            read_chain(json.loads(text.replace(old, new)), model, None)


def test_a_constant_of_the_forward_is_kept_and_weights_are_not(written):
    assert len(json.loads(written[2])["record"]["constants"]) == 1
    assert len(written[2]) < 10_000


def test_tensors_that_a_property_makes_are_not_kept():
    class WithTable(Net):
        @property
        def table(self):
            return self.offset + 1

    model = net()
    chain = rp.unravel(model, draw(2, 6), verify=False)
    model.__class__ = WithTable
    segment = chain.head
    graph = segment.graph
    constant = next(node for node in graph.nodes if node.op == "get_attr")
    constant.target = "table"
    segment.table = torch.ones(6)
    with pytest.raises(Unwritable, match="table"):
        write_chain(chain, model)


def test_what_cannot_be_written_gives_a_warning(tmp_path, monkeypatch):
    folder = tmp_path / "file" / "folder"
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="this chain is not kept"):
        rp.unravel(net(), draw(2, 6), cache=folder, verify=False)

    def fail(*_):
        raise Unwritable("a part that is unknown")

    monkeypatch.setattr(kept, "write_chain", fail)
    with pytest.warns(UserWarning, match="cannot be kept, since it has a part that is unknown"):
        rp.unravel(net(), draw(2, 6), cache=tmp_path, verify=False)


@pytest.mark.parametrize("cache", [1, "", __file__])
def test_folders_that_are_none(cache):
    with pytest.raises(rp.ResnetPathsError, match="cache"):
        rp.unravel(net(), draw(2, 6), cache=cache)


class WithMask(nn.Module):
    """Blocks that read a mask, with two branches each; a concatenation at the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(6, 6) for _ in range(2)) for _ in range(2))
        self.last = nn.Linear(6, 3)

    def forward(self, x, mask):
        for one, two in self.blocks:
            x = x + one(x * mask) + two(x).relu()
        x = torch.cat([x, self.last(x)], -1)
        return {"logits": x.mean(1)}


def test_chains_of_every_form(tmp_path, traces):
    small = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3).eval()
    forms = [
        (torchvision.models.resnet18(weights=None).eval(), torch.randn(2, 3, 32, 32)),
        (small, torch.randn(2, 3, 32, 32)),
        (WithMask().eval(), {"x": torch.randn(2, 5, 6), "mask": torch.ones(2, 5, 6)}),
    ]
    for model, x in forms:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = rp.unravel(model, x, cache=tmp_path, verify=False)
            count = len(traces)
            second = rp.unravel(model, x, cache=tmp_path)
        same_chain(first, second)
        assert len(traces) == count


@pytest.mark.slow
def test_keys_stay_when_torch_compile_has_run():
    code = (
        "import torch; from tests.unraveling.test_kept_chains import key; first = key(); "
        "torch.compile(torch.nn.Linear(2, 2), backend='eager')(torch.ones(1, 2)); print(first == key())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True"


@pytest.mark.slow  # imports torch in other processes
def test_keys_are_the_same_in_every_process():
    code = "from tests.unraveling.test_kept_chains import key; print(key())"
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in "12"]
    one, other = (
        subprocess.run([sys.executable, "-c", code], env=each, capture_output=True, text=True, check=True).stdout
        for each in environments
    )
    assert one == other

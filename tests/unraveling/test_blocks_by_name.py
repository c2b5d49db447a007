"""Chains from the names of their blocks, for models that cannot be exported as a whole."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torchvision
from torch import nn

import resnet_paths as rp
from tests.chains import assert_same, inputs, snapshot
from tests.unraveling.test_unraveling_forms import build, mlp

NAMES = [f"layers.{i}" for i in range(4)]


class Bottle(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.norm = mlp(width), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.inner(x))


class DataDependent(nn.Module):
    """Cannot be exported: its stem and its head look at the values."""

    def __init__(self, between=False):
        super().__init__()
        self.between = between
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(Bottle(4) for _ in range(4))

    def forward(self, x):
        x = self.inp(x)
        if x.abs().max() > 1e6:
            x = x / 2
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.between and i == 1:
                x = 2 * x
        return {"logits": self.out(x) if x.sum() < 1e6 else x}


def test_blocks_named_by_hand_where_the_model_cannot_be_exported():
    model, x = build(DataDependent), inputs()
    before = snapshot(model)
    with pytest.raises(rp.ResnetPathsError, match=r"data-dependent.*blocks=\[.layer1.0., ...\]"):
        rp.unravel(model, x)
    chain = rp.unravel(model, x, blocks=NAMES)
    more = inputs(7, seed=5)
    assert torch.equal(chain(more), model(more)["logits"])
    assert [block.name for block in chain] == NAMES
    assert chain.num_paths == 16
    state = model.inp(more)
    for i, layer in enumerate(model.layers):
        state = layer.norm(state) if i == 2 else layer(state)
    assert torch.allclose(rp.delete_block(chain, "layers.2")(more), model.out(state))
    loader = [(more, torch.tensor([0, 1, 2, 0, 1, 2, 0]))]
    assert len(rp.lesion_study(chain, loader, rp.single_deletions(chain), progress=False)) == 4
    frame = rp.gradient_by_path_length(chain, *loader[0])
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-10)
    assert sum(p.numel() for p in chain.parameters()) == sum(p.numel() for p in model.parameters())
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("blocks", "between", "message"),
    [
        (["layers.0", "layers.9"], False, r"blocks: got 'layers.9'; allowed: the name of a module, nearest"),
        (["layers.0", "layers.2"], False, r"blocks: got 'layers.2'; allowed: modules that run right after one another"),
        (["layers.1", "layers.2"], True, r"blocks: got 'layers.2'; allowed: modules that run right after one another"),
        ("layers.0", False, r"blocks: got 'layers.0'; allowed: a list of at least one module's name"),
        ([], False, r"blocks: got \[\]; allowed: a list"),
    ],
)
def test_bad_names_of_blocks(blocks, between, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.unravel(build(DataDependent, between), inputs(), blocks=blocks)


class Reads(DataDependent):
    """Its head also reads what its stem made, or the mask; a batch of one cannot tell which example's."""

    def __init__(self, what):
        super().__init__()
        self.what, self.embed = what, nn.Embedding(7, 5)

    def forward(self, x, mask=None):
        early = x = self.inp(self.embed(x).sum(1) if x.dtype == torch.int64 else x)
        for layer in self.layers:
            x = layer(x)
        if self.what == "stem":
            x = x + early
        if self.what == "mask":
            x = x * mask
        return self.out(x if x.sum() < 1e6 else -x)


@pytest.mark.parametrize(
    ("what", "example"),
    [
        ("stem", inputs(1)),
        ("stem", torch.zeros(1, 5, dtype=torch.float64)),
        ("stem", torch.tensor([[1, 2, 3]])),
        ("stem", torch.tensor([[6]])),
        ("stem", torch.tensor([[0, 0]])),
        ("mask", (inputs(1), torch.ones(1, 4, dtype=torch.bool))),
        ("mask", (inputs(1), torch.ones(1, 4, dtype=torch.float64))),
    ],
)
def test_a_head_that_reads_the_input_is_refused_for_a_batch_of_one(what, example):
    with pytest.raises(rp.ResnetPathsError, match=r"blocks: got .*between which and after which nothing else reads"):
        rp.unravel(build(Reads, what), example, blocks=NAMES)


def test_a_model_that_refuses_the_second_example_is_checked_on_the_first():
    class Strict(Reads):
        def forward(self, x, mask=None):
            if not mask.all():
                raise ValueError("masks are not implemented")
            return super().forward(x)

    model, example = build(Strict, ""), (inputs(1), torch.ones(1, 4, dtype=torch.bool))
    chain = rp.unravel(model, example, blocks=NAMES)
    other = (inputs(3), torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(chain(*other), model(*other))


class Masked(Bottle):
    def forward(self, x, mask=1.0):
        return self.norm(x + mask * self.inner(x))


def test_a_block_that_is_given_a_mask_is_refused():
    class Model(DataDependent):
        def forward(self, x, mask):
            x = self.inp(x)
            for layer in self.layers:
                x = layer(x, mask=mask)
            return self.out(x if x.sum() < 1e6 else -x)

    model = build(Model)
    model.layers = nn.ModuleList(build(Masked, 4) for _ in range(4))
    with pytest.raises(
        rp.ResnetPathsError, match=r"blocks: got 'layers.0'; allowed: modules that are given one tensor"
    ):
        rp.unravel(model, (inputs(4), torch.ones(4, 4).double()), blocks=NAMES)


class Boxed(Bottle):
    """Returns its output among other things."""

    def __init__(self, box):
        super().__init__(4)
        self.box = box

    def forward(self, x):
        return self.box(super().forward(x))


@pytest.mark.parametrize(
    ("box", "pick"),
    [
        (lambda y: (y, None), lambda r: r[0]),
        (lambda y: [y, y.mean()], lambda r: r[0]),
        (lambda y: {"weights": y.mean(0), "logits": y}, lambda r: r["logits"]),
    ],
)
def test_blocks_that_return_more_than_a_tensor(box, pick):
    class Model(DataDependent):
        def forward(self, x):
            x = self.inp(x)
            for layer in self.layers:
                x = pick(layer(x))
            return self.out(x if x.sum() < 1e6 else -x)

    model = build(Model)
    model.layers = nn.ModuleList(build(Boxed, box) for _ in range(4))
    chain = rp.unravel(model, inputs(1), blocks=NAMES)
    assert torch.equal(chain(inputs(3)), model(inputs(3)))


@dataclasses.dataclass
class Result:
    out: torch.Tensor


def test_blocks_that_return_an_object_are_refused():
    class Model(DataDependent):
        def forward(self, x):
            x = self.inp(x)
            for layer in self.layers:
                x = layer(x).out
            return self.out(x)

    model = build(Model)
    model.layers = nn.ModuleList(build(Boxed, Result) for _ in range(2))
    with pytest.raises(rp.ResnetPathsError, match=r"blocks: got 'one that returns a Result'; allowed: modules that"):
        rp.unravel(model, inputs(1), blocks=NAMES[:2])


def test_blocks_by_name_are_those_of_the_exported_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.resnet18(width_per_group=64, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    exported = rp.unravel(model, x)
    chain = rp.unravel(model, x, blocks=[block.name for block in exported])
    assert [b.stage for b in chain] == [b.stage for b in exported] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [(b.in_shape, b.out_shape) for b in chain] == [(b.in_shape, b.out_shape) for b in exported]
    plans = [[plan.name for plan in rp.duplications(c)] for c in (chain, exported)]
    assert plans[0] == plans[1] != []


class InPlace(DataDependent):
    def forward(self, x):
        return super().forward(x.mul_(2))["logits"]


def test_a_model_that_writes_over_its_input():
    model, x = build(InPlace), inputs(2)
    chain = rp.unravel(model, x, blocks=NAMES)
    assert torch.equal(x, inputs(2))
    x.zero_()  # the example is the user's own
    assert torch.equal(chain(inputs(3)), model(inputs(3)))


def test_a_copy_in_another_precision():
    model = build(DataDependent)
    chain = copy.deepcopy(rp.unravel(model, inputs(2), blocks=NAMES)).float()
    with torch.no_grad():
        assert torch.equal(chain(inputs(3).float()), copy.deepcopy(model).float()(inputs(3).float())["logits"])

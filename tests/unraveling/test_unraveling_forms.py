"""Blocks beyond skip and branch: alternatives, chains inside branches, gates, tied weights; other signatures."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.parts import Parallel
from resnet_paths.core.paths import path_length
from tests.chains import assert_same, inputs, snapshot


def build(cls, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(*args).double().eval()


def mlp(width, inner=6):
    return nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width))


class Stack(nn.Module):
    """A stem, `depth` applications of `step` to the state, a head; steps use layers a[i], b[i] and norms n[i]."""

    def __init__(self, step, depth=3, width=4):
        super().__init__()
        self.inp, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        self.a = nn.ModuleList(mlp(width) for _ in range(depth))
        self.b = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.n = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.step = step

    def forward(self, x):
        x = self.inp(x)
        for i in range(len(self.a)):
            x = self.step(self, i, x)
        return self.out(x)


def skip_first(m, i, x):
    h = m.n[i](x)
    return x + m.a[i](h) + m.b[i](h)


def skip_last(m, i, x):
    h = m.n[i](x)
    return m.a[i](h) + m.b[i](h) + x


def skip_between(m, i, x):
    return m.a[i](x) + x + m.b[i](x)


def sum_first(m, i, x):
    return x + (m.b[i](x) + m.a[i](x))


@pytest.mark.parametrize("step", [skip_first, skip_last, skip_between, sum_first])
def test_several_additions_at_one_merge_are_alternatives(step):
    model, x = build(Stack, step), inputs()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 6, 12, 8]  # (1 + 2t)^3
    assert [block.skip_kind for block in chain] == ["identity"] * 3
    # Each path alone: the skip, or one of the two branches.
    state = model.inp(x)
    h = state if step in (skip_between, sum_first) else model.n[0](state)
    one = rp.path_network(chain, (1, False, False))(x)
    two = rp.path_network(chain, (2, False, False))(x)
    routes = [model.out(model.a[0](h)), model.out(model.b[0](h))]
    assert any(torch.allclose(one, r) and torch.allclose(two, s) for r, s in itertools.permutations(routes))
    assert torch.allclose(rp.delete_blocks(chain, [0, 1, 2])(x), model.out(state))
    frame = rp.gradient_by_path_length(chain, x, torch.tensor([0, 1, 2, 0]))
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-10)


def test_a_scaled_alternative_keeps_the_order_of_the_sum():
    model, x = build(Stack, skip_first).float(), inputs().float()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert torch.equal(rp.scale_block(chain, 1, 1.0)(x), model(x))


class Flat(nn.Module):
    """As OPT: the MLP sees the places of all examples as one batch, and is added there."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(mlp(4) for _ in range(4))

    def forward(self, x):
        x = self.inp(x)[:, None] * torch.ones(3, 1, dtype=x.dtype)
        for i in (0, 2):
            x = x + self.layers[i](x)
            shape = x.shape
            flat = x.reshape(-1, 4)
            x = (flat + self.layers[i + 1](flat)).view(shape)
        return self.out(x.mean(1))


@pytest.mark.parametrize(("split", "seen"), [(False, "meta"), (True, "cpu")])
def test_examples_go_where_the_model_is_unless_it_is_in_several_places(split, seen):
    model, places = nn.Linear(3, 3, device="meta"), set()
    if split:
        model.register_buffer("here", torch.zeros(1))
    model.register_forward_pre_hook(lambda module, args: places.add(args[0].device.type))
    with contextlib.suppress(ResnetPathsError):  # nothing can be compared there
        rp.unravel(model.eval(), torch.zeros(2, 3))
    assert places == {seen}


def test_examples_stay_apart_between_blocks():
    model, x = build(Flat), inputs()
    chain = rp.unravel(model, x)
    for batch in (1, 4, 6):
        assert torch.equal(chain(inputs(batch)), model(inputs(batch)))
    assert [block.out_shape for block in chain] == [(3, 4)] * 4
    assert chain.num_paths == 16


class RepBlocks(nn.Module):
    """As RepVGG: a wide and a narrow map side by side, and a normalised identity where the width stays."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.wide = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.narrow = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2))

    def forward(self, x):
        x = self.inp(x)
        for i in range(3):
            y = self.wide[i](x) + self.narrow[i](x)
            x = torch.relu(y if i == 0 else y + self.norm[i - 1](x))
        return self.out(x)


def test_branches_alike_without_a_skip_are_alternatives():
    model, x = build(RepBlocks), inputs()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert [block.skip_kind for block in chain] == [None, "projection", "projection"]
    assert rp.path_histogram(chain).num_paths.tolist() == [0, 2, 8, 8]  # 2t (1 + 2t)^2
    assert isinstance(chain[0].branch, Parallel)


class UNet(nn.Module):
    """Two long skips, each joined by concatenation or addition, and two residual blocks at the bottom."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(8 if join == "cat" else 4, 3)
        self.down1, self.down2 = nn.Linear(4, 3), nn.Linear(3, 2)
        self.bottom = nn.ModuleList(mlp(2) for _ in range(2))
        self.up2, self.up1 = nn.Linear(2, 3), nn.Linear(6 if join == "cat" else 3, 4)

    def joined(self, x, y):
        return torch.cat([x, y], 1) if self.join == "cat" else x + y

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        y = torch.tanh(self.down1(x))
        z = torch.tanh(self.down2(y))
        for f in self.bottom:
            z = z + f(z)
        y = self.joined(y, torch.tanh(self.up2(z)))
        return self.out(self.joined(x, torch.tanh(self.up1(y))))


@pytest.mark.parametrize("join", ["cat", "add"])
def test_a_u_net_is_a_chain_of_one_block_that_holds_the_network_inside_it(join):
    model, x = build(UNet, join), inputs()
    before = snapshot(model)
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert_same(before, snapshot(model))
    assert len(chain) == 1
    assert isinstance(chain[0].branch, ResidualChain)
    # 1 + t (1 + t (1 + t)^2): past everything, or into the network inside.
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 1, 1, 2, 1]
    assert [rp.unravel(model, x, max_depth=depth).num_paths for depth in (0, 1, 2, 3)] == [2, 3, 6, 6]
    frame = rp.gradient_by_path_length(chain, x, torch.tensor([0, 1, 2, 0]))
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-10)
    with torch.no_grad():
        assert chain.summary().count("\n") == 1 + 1 + 1 + 2 + 1  # the last line is that of the input sizes


def test_blocks_inside_a_branch_are_edited_by_name():
    model, x = build(UNet, "add"), inputs()
    chain = rp.unravel(model, x)
    before = snapshot(chain)
    names = [block.name for block in chain[0].branch[0].branch]
    assert names == ["bottom.0", "bottom.1"]

    def by_hand(*branches):
        a = torch.tanh(model.inp(x))
        b = torch.tanh(model.down1(a))
        z = torch.tanh(model.down2(b))
        for f in branches:
            z = z + f(z)
        return model.out(a + torch.tanh(model.up1(b + torch.tanh(model.up2(z)))))

    f, g = model.bottom
    edited = {
        rp.delete_block(chain, "bottom.0"): by_hand(g),
        rp.delete_blocks(chain, names): by_hand(),
        rp.swap_blocks(chain, *names): by_hand(g, f),
        rp.duplicate_block(chain, "bottom.1"): by_hand(f, g, g),
        rp.scale_block(chain, "bottom.1", 0.5): by_hand(f, lambda z: 0.5 * g(z)),
    }
    for lesioned, expected in edited.items():
        assert torch.allclose(lesioned(x), expected, rtol=0, atol=1e-14)
    assert rp.delete_block(chain, "bottom.0").num_paths == 4
    assert_same(before, snapshot(chain))


def forms(gate, new, x):
    return [
        gate * new + (1 - gate) * x,
        x * (1 - gate) + new * gate,
        (1 - gate) * new + gate * x,
        x + gate * (new - x),
    ]


@pytest.mark.parametrize("form", range(4))
def test_a_highway_layer_is_a_block_with_an_identity_skip(form):
    model, x = build(Stack, lambda m, i, x: forms(torch.sigmoid(m.b[i](x)), m.a[i](x), x)[form]), inputs()
    chain = rp.unravel(model, x)
    assert torch.allclose(chain(x), model(x), rtol=0, atol=1e-14)
    assert chain.num_paths == 8
    assert [block.skip_kind for block in chain] == ["identity"] * 3
    closed = rp.delete_blocks(chain, [0, 1, 2])(x)
    assert torch.allclose(closed, model.out(model.inp(x)), rtol=0, atol=1e-14)


def test_what_only_looks_like_a_gate_stays_as_it_is():
    model, x = build(Stack, lambda m, i, x: x + m.b[i](x) * m.a[i](x)), inputs()
    assert torch.equal(rp.unravel(model, x)(x), model(x))


class Tied(nn.Module):
    """One layer run four times; positional, keyword and constant arguments; a dictionary comes out."""

    def __init__(self):
        super().__init__()
        self.inp, self.layer, self.out = nn.Linear(5, 4), mlp(4), nn.Linear(4, 3)

    def forward(self, x, scale=None, *, times=1.0):
        x = self.inp(x)
        if scale is not None:
            x = x * scale
        for _ in range(4):
            x = x + times * self.layer(x)
        return {"hidden": x, "logits": self.out(x)}


def test_tied_blocks_are_numbered_and_share_their_weights():
    model, x = build(Tied), inputs()
    chain = rp.unravel(model, x)
    assert [block.name for block in chain] == ["layer", "layer@1", "layer@2", "layer@3"]
    assert sum(p.numel() for p in chain.parameters()) == sum(p.numel() for p in model.parameters())
    state = model.inp(x)
    for _ in range(3):
        state = state + model.layer(state)
    assert torch.allclose(rp.delete_block(chain, "layer@2")(x), model.out(state))


class AddsInside(nn.Module):
    """A layer of two modules that add, like one of a transformer whose layers share their weights."""

    def __init__(self, inner=True):
        super().__init__()
        self.inner = AddsInside(inner=False) if inner else nn.Identity()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        x = self.inner(x)
        return self.norm(x + self.second(torch.tanh(self.first(x))))


def test_modules_that_add_and_run_again_are_numbered():
    model, x = build(lambda: Stack(lambda m, i, x: m.shared(x))), inputs()
    model.shared = AddsInside().to(x)
    chain = rp.unravel(model, x)
    assert [block.name for block in chain] == [
        name + again for again in ("", "@1", "@2") for name in ("shared.inner", "shared")
    ]
    state = model.shared(model.inp(x))
    state = model.shared(model.shared.norm(model.shared.inner(state)))  # without the branch of the second call
    assert torch.allclose(rp.delete_block(chain, "shared@1")(x), model.out(state))


def test_keyword_arguments_constants_and_chosen_outputs():
    model, x = build(Tied), inputs()
    scale = torch.full((4, 1), 0.5, dtype=torch.float64)
    chain = rp.unravel(model, {"x": x, "scale": scale, "times": 0.5})
    expected = model(x, scale, times=0.5)
    assert torch.equal(chain(scale=scale, x=x, times=0.5), expected["logits"])
    more = torch.cat([x, x]), torch.cat([scale, scale])
    assert torch.equal(chain(x=more[0], scale=more[1], times=0.5), model(*more, times=0.5)["logits"])
    for output in ("hidden", 0, -2):
        assert torch.equal(rp.unravel(model, (x,), output=output)(x), model(x)["hidden"])
    with pytest.raises(rp.ResnetPathsError, match=r"inputs: got .*allowed: arguments as in the example"):
        chain(x=x, scale=scale, times=0.25)
    with pytest.raises(
        rp.ResnetPathsError, match=r"output: got 'probabilities'; allowed: one of \['hidden', 'logits'\]"
    ):
        rp.unravel(model, x, output="probabilities")


@dataclass
class Result:
    last_hidden_state: torch.Tensor
    attentions: tuple = ()


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.inner = kind, Tied()

    def forward(self, x):
        made = self.inner(x)
        hidden, logits = made["hidden"], made["logits"]
        return {
            "tuple": (logits, hidden),
            "list": [logits, hidden],
            "dataclass": Result(hidden),
            "nested": {"all": (hidden, logits), "main": logits},
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "pick"),
    [
        ("tuple", lambda r: r[0]),
        ("list", lambda r: r[0]),
        ("dataclass", lambda r: r.last_hidden_state),
        ("nested", lambda r: r["main"]),
    ],
)
def test_containers_of_outputs(kind, pick):
    model, x = build(Returns, kind), inputs()
    before = snapshot(model)
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), pick(model(x)))
    assert len(chain) == 4
    assert_same(before, snapshot(model))


def test_lengths_in_other_units():
    model, x = build(Stack, lambda m, i, x: x + m.a[i](x)), inputs()
    chain = rp.unravel(model, x)
    assert rp.path_histogram(chain, "weight_layer").num_paths.tolist() == [1, 0, 3, 0, 3, 0, 1]
    assert rp.path_histogram(chain, "transformer_layer").num_paths.tolist() == [1, 3, 3, 1]
    renamed = chain.with_blocks(b.replace(name=f"layers.{i // 2}.part{i}") for i, b in enumerate(chain))
    assert rp.path_histogram(renamed, "transformer_layer").num_paths.tolist() == [1, 4, 3]  # (1 + 3t)(1 + t)
    parallel = rp.unravel(build(Stack, skip_last), x)
    assert rp.path_histogram(parallel, "weight_layer").num_paths.tolist() == [1, 3, 6, 7, 6, 3, 1]  # (1 + t + t^2)^3
    with pytest.raises(rp.ResnetPathsError, match=r"unit: got 'neuron'; allowed: one of 'block', 'transformer_layer'"):
        rp.path_histogram(chain, "neuron")
    nested = rp.unravel(build(UNet, "add"), x)
    lengths = list(map(path_length, rp.enumerate_paths(nested)))
    assert nested.length_polynomial() == [lengths.count(k) for k in range(max(lengths) + 1)]
    with pytest.raises(rp.ResnetPathsError, match=r"unit: got 'weight_layer'; allowed: 'block' for a chain inside"):
        rp.path_histogram(nested, "weight_layer")


def test_the_summary_says_what_blocks_hold():
    chain = rp.unravel(build(Stack, skip_first), inputs())
    lines = chain.summary().splitlines()
    assert lines[0] == f"ResidualChain of 3 blocks, 27 paths, {sum(p.numel() for p in chain.parameters())} parameters"
    assert "norm, linear, tanh, linear | norm, linear" in lines[2]
    assert "<table" in chain._repr_html_()
    assert "deleted" in rp.delete_block(chain, 0).summary()


class WaveNet(nn.Module):
    """Residual and skip sums; `scaled` multiplies each residual sum, `gathered` adds the skips up at the end."""

    def __init__(self, scaled, gathered):
        super().__init__()
        self.scaled, self.gathered = scaled, gathered
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(6, 3)
        self.gate = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.res = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.skip = nn.ModuleList(nn.Linear(4, 6) for _ in range(4))

    def layer(self, i, x):
        h = torch.tanh(self.gate[i](x)) * torch.sigmoid(self.gate[i](x))
        return self.res[i](h), self.skip[i](h)

    def forward(self, x, without=()):
        x, skips, total = self.inp(x), [], 0
        for i in range(4):
            residual, skip = self.layer(i, x)
            if i not in without:
                x = x + residual
                total = total + skip
                skips.append(skip)
            if self.scaled:
                x = x * 0.5**0.5
        return self.out(torch.relu(sum(skips) if self.gathered else total))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_wavenet_is_a_chain_on_the_pair_of_value_and_sum(scaled, gathered):
    model, x = build(WaveNet, scaled, gathered), inputs()
    chain = rp.unravel(model, x)
    assert torch.equal(chain(x), model(x))
    assert torch.equal(chain(inputs(7)), model(inputs(7)))
    assert len(chain) == 4
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 4, 6, 4, 1]
    for i in range(4):
        assert torch.allclose(rp.delete_block(chain, i)(x), model(x, without=(i,)), rtol=0, atol=1e-14)
    frame = rp.gradient_by_path_length(chain, x, torch.tensor([0, 1, 2, 0]))
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-10)
    assert frame.gradient_share[0] == 0  # no way to the output but through a branch
    # The first makes the pair and the last leaves it: the others may trade places, or run twice.
    pair = (10,)  # 4 of the value and 6 of the sum
    shapes = [(block.in_shape, block.out_shape) for block in chain]
    assert shapes[:3] == [((4,), pair), (pair, pair), (pair, pair)]
    assert shapes[3][0] == pair
    lesions = [*rp.single_deletions(chain), *rp.duplications(chain)]
    assert [lesion.blocks for lesion in lesions] == [(0,), (1,), (2,), (3,), (1,), (2,)]
    study = rp.lesion_study(chain, [(x, torch.tensor([0, 1, 2, 0]))], lesions, progress=False)
    assert len(study) == 6
    turned = rp.reverse_blocks(chain, stage=0)
    assert [block.name for block in turned] == [chain[i].name for i in (0, 2, 1, 3)]
    assert torch.equal(rp.reverse_blocks(turned, stage=0)(x), model(x))
    with pytest.raises(rp.ResnetPathsError, match=r"a block with in_shape \(4,\) in place of"):
        rp.swap_blocks(chain, 0, 1)
    assert rp.block_norms(chain, x).block_index.tolist() == [0, 1, 2, 3]

"""Dense connections: concatenation is addition in a wider space (Huang et al. 2017)."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import resnet_paths as rp
from resnet_paths.core.parts import Placed
from tests.chains import inputs


class DenseLayer(nn.Module):
    def __init__(self, width, growth):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, growth, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.norm(x)))


class DenseNet(nn.Module):
    """Four layers and a transition; `layout` is how the features are put together."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList([DenseLayer(4 + 2 * i, 2) for i in range(3)])
        self.transition = nn.Conv2d(10, 5, 1)
        self.last = DenseLayer(5, 2)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            if self.layout == "all again":
                features.append(layer(torch.cat(features, 1)))
            else:
                new = [features[0], layer(features[0])]
                features = [torch.cat(new if self.layout == "behind" else new[::-1], 1)]
        x = self.transition(torch.cat(features, 1))
        return self.head(torch.cat([x, self.last(x)], 1).mean((2, 3)))


def images(batch=2, size=8):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def dense_net(layout):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DenseNet(layout).eval()


@pytest.mark.parametrize("layout", ["all again", "behind", "in front"])
def test_a_dense_network_is_a_chain_in_a_wider_space(layout):
    model, x = dense_net(layout), images()
    chain = rp.unravel(model, x)
    assert [block.name for block in chain] == ["layers.0", "layers.1", "layers.2", "last"]
    assert {block.skip_kind for block in chain} == {"concat"}
    assert [block.out_shape for block in chain] == [(6, 8, 8), (8, 8, 8), (10, 8, 8), (7, 8, 8)]
    assert (chain.num_paths, rp.path_histogram(chain).num_paths.tolist()) == (16, [1, 4, 6, 4, 1])
    with torch.no_grad():
        for batch in (1, 2, 3):
            assert torch.equal(chain(images(batch)), model(images(batch)))
    ours = {id(p) for p in chain.parameters()}
    assert ours == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("layout", ["all again", "behind", "in front"])
@pytest.mark.parametrize("name", ["layers.0", "layers.2", "last"])
def test_deleting_a_layer_leaves_zeros_in_its_channels(layout, name):
    model, x = dense_net(layout), images()
    lesioned = rp.delete_block(model, name, example_inputs=x)
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with torch.no_grad():
        expected = model(x)
        handle.remove()
        assert torch.equal(lesioned(x), expected)
        assert not torch.equal(expected, model(x))


def test_paths_of_a_dense_network_run_alone():
    chain = rp.unravel(dense_net("all again"), images())
    with torch.no_grad():
        outputs = [rp.path_network(chain, path)(images()) for path in rp.enumerate_paths(chain)]
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 16


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_placed_pads_with_zeros(dim):
    x = images(2, 4)
    size = x.shape[dim]
    placed = Placed(dim % 4, 2, 3)(x)
    assert torch.equal(placed.narrow(dim, 2, size), x)
    assert placed.shape[dim] == size + 5
    assert placed.count_nonzero() == x.count_nonzero()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("densenet121", (6, 12, 24, 16))])
def test_torchvision_densenets(name, layers):
    model = getattr(torchvision.models, name)(weights=None, num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    chain = rp.unravel(model, x)
    documented = [f"features.denseblock{b}.denselayer{i + 1}" for b, n in enumerate(layers, 1) for i in range(n)]
    assert [block.name for block in chain] == documented
    assert chain.num_paths == 2 ** sum(layers)
    with torch.no_grad():
        assert torch.equal(chain(x), model(x))


class Joined(nn.Module):
    """Two modules of one `form` between a stem and a head."""

    def __init__(self, form, width=4):
        super().__init__()
        self.inp, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        self.a, self.b, self.c, self.back = (
            nn.ModuleList(nn.Linear(m, n) for _ in range(2))
            for m, n in [(width, 3), (width, 2), (3, 3), (FORMS[form][1], width)]
        )
        self.form = FORMS[form][0]

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        for i in range(2):
            x = torch.tanh(self.back[i](self.form(self, i, x)))
        return self.out(x)


def inception(m, i, x):
    return torch.cat([m.a[i](x), m.c[i](torch.tanh(m.a[i].weight @ x.mT).mT), m.b[i](x)], 1)


def with_pooling(m, i, x):
    return torch.cat([m.a[i](x), x[:, ::2] * x[:, 1::2], m.b[i](x)], 1)


def half_carried_over(m, i, x):
    left, right = x.chunk(2, 1)
    return torch.cat([left, torch.tanh(right @ m.b[i].weight[:, :2])], 1)


def aggregated_once(m, i, x):
    one = torch.tanh(m.a[i](x))
    two = torch.tanh(m.c[i](one))
    return torch.cat([x, one, two], 1)


def in_groups(m, i, x):
    left, right = x.chunk(2, 1)
    groups = [torch.tanh(left @ m.b[i].weight[:, :2]), torch.tanh(right @ m.b[i].weight[:, 2:])]
    return x + torch.cat(groups, 1)


def partly_added(m, i, x):
    y = torch.cat([m.a[i](x), m.b[i](x)], 1)
    return torch.cat([y[:, :4] + x, y[:, 4:]], 1)


FORMS = {
    "partly added": (partly_added, 5),
    "inception": (inception, 8),
    "with pooling": (with_pooling, 7),
    "half": (half_carried_over, 4),
    "aggregated once": (aggregated_once, 10),
    "in groups": (in_groups, 4),
}


def joined(form):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Joined(form).double().eval(), inputs()


@pytest.mark.parametrize(
    ("form", "kind", "by_length"),
    [
        ("inception", None, [0, 0, 9]),  # (3 t)^2
        ("with pooling", "concat", [1, 4, 4]),  # (1 + 2 t)^2
        ("half", "concat", [1, 2, 1]),  # (1 + t)^2
        ("aggregated once", "concat", [1, 2, 3, 2, 1]),  # (1 + t (1 + t))^2
        ("partly added", "projection", [1, 0, 4, 0, 4]),  # (1 + t 2 t)^2: the branch holds two side by side
        ("in groups", "identity", [1, 2, 1]),  # the groups are one layer of the branch
    ],
)
def test_other_concatenations(form, kind, by_length):
    model, x = joined(form)
    chain = rp.unravel(model, x)
    for batch in (1, 4, 6):
        assert torch.equal(chain(inputs(batch)), model(inputs(batch)))
    assert [block.skip_kind for block in chain] == [kind] * 2
    assert rp.path_histogram(chain).num_paths.tolist() == by_length
    frame = rp.gradient_by_path_length(chain, x, torch.tensor([0, 1, 2, 0]))
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-10)


def test_alternatives_without_a_skip_cannot_be_deleted_and_each_runs_alone():
    model, x = joined("inception")
    chain = rp.unravel(model, x)
    with pytest.raises(rp.ResnetPathsError, match="allowed: a block with a skip"):
        rp.delete_block(chain, 0)
    state = torch.tanh(model.inp(x))
    features = inception(model, 0, state)
    start = 0
    parts = []
    for width in (3, 3, 2):
        alone = torch.zeros_like(features)
        alone[:, start : start + width] = features[:, start : start + width]
        parts.append(model.out(torch.tanh(model.back[1](inception(model, 1, torch.tanh(model.back[0](alone)))))))
        start += width
    for index, expected in enumerate(parts):
        only = chain.with_blocks([rp.path_network(chain, (index + 1, 1))[0], chain[1]])
        assert torch.allclose(only(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("form", "kept"), [("half", slice(0, 2)), ("with pooling", slice(3, 5))])
def test_deleting_leaves_zeros_where_the_branches_were(form, kept):
    model, x = joined(form)
    lesioned = rp.delete_block(rp.unravel(model, x), 1)
    state = torch.tanh(model.back[0](model.form(model, 0, torch.tanh(model.inp(x)))))
    features = model.form(model, 1, state)
    zeroed = torch.zeros_like(features)
    zeroed[:, kept] = features[:, kept]
    expected = model.out(torch.tanh(model.back[1](zeroed)))
    assert torch.allclose(lesioned(x), expected, rtol=0, atol=1e-14)


def test_deleting_what_is_aggregated_once():
    model, x = joined("aggregated once")
    chain = rp.unravel(model, x)
    inner = next(block for block in chain[0].branch).name
    state = torch.tanh(model.inp(x))
    features = aggregated_once(model, 0, state)
    for block, first in ((0, 4), (inner, 7)):
        zeroed = torch.cat([features[:, :first], torch.zeros_like(features[:, first:])], 1)
        after = torch.tanh(model.back[1](aggregated_once(model, 1, torch.tanh(model.back[0](zeroed)))))
        assert torch.allclose(rp.delete_block(chain, block)(x), model.out(after), rtol=0, atol=1e-14)

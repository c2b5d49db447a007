"""Dense connections: concatenation is addition in a wider space (Huang et al. 2017)."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import resnet_paths as rp
from resnet_paths.chain import Placed


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
            if self.layout == "all anew":
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


@pytest.mark.parametrize("layout", ["all anew", "behind", "in front"])
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


@pytest.mark.parametrize("layout", ["all anew", "behind", "in front"])
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
    chain = rp.unravel(dense_net("all anew"), images())
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

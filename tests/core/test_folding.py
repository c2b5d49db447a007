"""BatchNorm folded into convolutions: the same map, fewer operations, nothing of the model's own changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import resnet_paths as rp
from resnet_paths.core.folding import fold_batchnorm
from resnet_paths.core.placement import place_modules
from resnet_paths.lesions.trie import Trie
from resnet_paths.unraveling import tracing
from tests.chains import Plan, assert_same, random_chain, snapshot
from tests.core.test_placement import images
from tests.gradients.gradient_reference import seeded


def norm(channels, dims=2, **options):
    """A BatchNorm with statistics, scale and shift unlike those it begins with."""
    made = getattr(nn, f"BatchNorm{dims}d")(channels, **options)
    for tensor in (made.running_var, made.weight):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 2.0)
    for tensor in (made.running_mean, made.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    return made


def exported(*parts, example):
    """Parts in series, in eval mode and float64, and the same as one exported graph that reads their tensors."""
    model = nn.Sequential(*parts).double().eval()
    trace = tracing.trace(model, (example,))
    for node in trace.graph.nodes:
        if node.op == "output":
            node.args = (trace.output,)
    return model, GraphModule(dict(trace.tensors), trace.graph)


def norms_in(module):
    graphs = [part for part in module.modules() if isinstance(part, GraphModule)]
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    return targets.count(torch.ops.aten.batch_norm.default)


def starts_with_norm(chain):
    first = next(node for node in chain[0].branch.graph.nodes if node.op == "call_function")
    return first.target is torch.ops.aten.batch_norm.default


SERIES = {
    "no bias": (lambda: (nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1), norm(2)), 2, 2),
    "bias, stride, groups": (lambda: (nn.Conv2d(3, 6, 3, 2, 1, groups=3), norm(6)), 2, 1),
    "dilated, as wide as before": (lambda: (nn.Conv2d(3, 4, 3, padding="same", dilation=2), norm(4)), 2, 1),
    "no scale": (lambda: (nn.Conv2d(3, 4, 2), norm(4, affine=False, eps=0.1)), 2, 1),
    "one dimension": (lambda: (nn.Conv1d(3, 4, 2), norm(4, 1)), 1, 1),
    "three dimensions": (lambda: (nn.Conv3d(3, 4, 2), norm(4, 3)), 3, 1),
    "after a nonlinearity": (lambda: (norm(3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), norm(4)), 2, 0),
    "twice": (lambda: (nn.Conv2d(3, 4, 2), norm(4), norm(4)), 2, 2),
    "transposed": (lambda: (nn.ConvTranspose2d(3, 4, 2), norm(4)), 2, 0),
    "batch statistics": (lambda: (nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4, track_running_stats=False)), 2, 0),
}


@pytest.mark.parametrize("name", SERIES)
def test_the_map_stays(name):
    make, dims, count = SERIES[name]
    with seeded():
        x = torch.randn(3, 3, *[6] * dims, dtype=torch.float64)
        model, graph = exported(*make(), example=x)
        before, weights, was = norms_in(graph), snapshot(model), model(x)
        assert fold_batchnorm(graph) == count
        assert norms_in(graph) == before - count
        assert (graph(x) - was).abs().max() < 1e-13
        assert_same(weights, snapshot(model))
        assert fold_batchnorm(graph) == 0


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), norm(3)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


class Standardised(nn.Module):
    """A convolution whose weights are computed as it runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), norm(3)

    def forward(self, x):
        return self.norm(nn.functional.conv2d(x, self.conv.weight - self.conv.weight.mean()))


@pytest.mark.parametrize("kind", [ReadTwice, Standardised])
def test_what_cannot_be_folded_stays(kind):
    with seeded():
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        _, graph = exported(kind(), example=x)
    was = graph(x)
    assert fold_batchnorm(graph) == 0
    assert torch.equal(graph(x), was)


class PreactBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = norm(4), nn.Conv2d(4, 4, 1), norm(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))


class PostactBlock(PreactBlock):
    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm(4))
        self.blocks = nn.Sequential(block(), block(), block())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module", params=[PreactBlock, PostactBlock])
def chain(request):
    with seeded():
        return rp.unravel(Net(request.param).double().eval(), images(2)[0].double())


@pytest.fixture
def loader():
    x, labels = images()
    return [(x[:25].double(), labels[:25]), (x[25:].double(), labels[25:])]


def test_chains_share_what_was_folded_and_the_original_is_as_it_was(chain):
    chains, before = [chain, rp.delete_block(chain, 1), rp.swap_blocks(chain, 0, 2)], snapshot(chain)
    folded = place_modules(chains, fold_batchnorm=True)
    assert_same(before, snapshot(chain))
    # A pre-activation block keeps its first.
    assert (norms_in(chain), norms_in(folded[0])) == (7, 3 if starts_with_norm(chain) else 0)
    assert folded[0][0].branch is folded[1][0].branch is folded[2][2].branch
    assert Trie(folded).block_evaluations == Trie(chains).block_evaluations
    x = images()[0].double()
    for one, other in zip(chains, folded, strict=True):
        assert (one(x) - other(x)).abs().max() < 1e-13


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"batch_budget": 60}, {"precision": "float32"}])
def test_a_study_says_the_same(chain, loader, options):
    lesions = rp.single_deletions(chain)
    plain = rp.lesion_study(chain, loader, lesions, progress=False, **options)
    folded = rp.lesion_study(chain, loader, lesions, progress=False, fold_batchnorm=True, **options)
    assert (plain.attrs["fold_batchnorm"], folded.attrs["fold_batchnorm"]) == (False, True)
    of_loss = [name for name in plain if "cross_entropy" in name]
    assert plain.drop(columns=of_loss).equals(folded.drop(columns=of_loss))
    tolerance = 1e-5 if "precision" in options else 1e-12
    assert (plain[of_loss] - folded[of_loss]).abs().max().max() < tolerance


def test_pieces_of_folded_networks_are_kept_apart(chain, loader, tmp_path):
    found = [
        rp.lesion_study(chain, loader, rp.single_deletions(chain), store=tmp_path, progress=False, fold_batchnorm=fold)
        for fold in (False, True, True)
    ]
    assert [frame.attrs["batches_found"] for frame in found] == [0, 0, 2]


def test_without_exported_parts_nothing_is_folded():
    by_hand = random_chain((3, tuple(Plan(3, "identity", False, False) for _ in range(2))))
    x = torch.ones(1, 5, dtype=torch.float64)
    assert torch.equal(place_modules([by_hand], fold_batchnorm=True)[0](x), by_hand(x))


def test_statistics_cannot_be_estimated_of_what_is_folded(chain, loader):
    with pytest.raises(rp.ResnetPathsError, match="fold_batchnorm: got True; allowed: False with reestimate_batchnorm"):
        rp.lesion_study(
            chain, loader, rp.single_deletions(chain), fold_batchnorm=True, reestimate_batchnorm=loader, progress=False
        )

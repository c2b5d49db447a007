"""Paths are routes: polynomials of paths against a walk over the exported graph that knows nothing of the library.

The walk exports a model itself. Each call of a module that the test names, a branch, is one vertex; so is each call of
any other module without modules of its own, such as a norm, whatever operations it is exported to. All routes from
input to output are then listed one by one. The length of a route is the number of branches that it enters.
"""

from __future__ import annotations

import random
import re
from collections import Counter

import networkx as nx
import pytest
import torch
from torch import nn

import resnet_paths as rp


def routes(model, x, is_branch, is_gate=lambda name: False):
    """Every route from input to output: the calls of branches that it enters, in order, as in ``"f.0", "f.1"``.

    A gate multiplies what flows along a route and is none itself: no route leads through modules named by `is_gate`.
    """
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False).run_decompositions({})
    signature = program.graph_signature
    graph, vertex = nx.DiGraph(), {}
    for node in program.graph.nodes:
        vertex[node] = _vertex(node, model, is_branch, is_gate)
        for before in node.all_input_nodes:
            if vertex[before] != vertex[node] and "gate" not in (vertex[before][0], vertex[node][0]):
                graph.add_edge(vertex[before], vertex[node])
    (start,) = signature.user_inputs
    (end,) = signature.user_outputs
    by_name = {node.name: at for node, at in vertex.items()}
    listed = nx.all_simple_paths(graph, by_name[start], by_name[end])
    return [tuple(name for kind, name in route if kind == "branch") for route in listed]


def _vertex(node, model, is_branch, is_gate):
    """(Kind, name): the call of a module that a node belongs to, or the node itself."""
    for key, (module, _) in (node.meta.get("nn_module_stack") or {}).items():
        call = key.removeprefix("L__self__")  # "f@1" is the second call of f
        if is_gate(module):
            return "gate", call
        if is_branch(module):
            return "branch", call
        if module and not list(model.get_submodule(module).children()):
            return "module", call
    return "operation", node.name


def by_length(lengths):
    counts = Counter(lengths)
    return [counts[k] for k in range(max(counts) + 1)]


def named(pattern):
    return lambda name: re.fullmatch(pattern, name) is not None


def weight_layers(model, name):
    return sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.get_submodule(name.split("@")[0]).modules())


def mlp(width=4, layers=2):
    maps = [[nn.Linear(width, width), nn.Tanh()] for _ in range(layers)]
    return nn.Sequential(*(module for both in maps for module in both))


class Net(nn.Module):
    """A stem, `body` on the state, a head; `parts` are the modules that `body` uses."""

    def __init__(self, body, **parts):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.body = body
        for name, part in parts.items():
            self.add_module(name, nn.ModuleList(part) if isinstance(part, list) else part)

    def forward(self, x):
        return self.out(self.body(self, torch.tanh(self.inp(x))))


class Attention(nn.Module):
    """Each example is one token of four features, seen as four tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(1, 2) for _ in range(3))
        self.o = nn.Linear(2, 1)

    def forward(self, x):
        x = x[..., None]
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return self.o(weights @ self.v(x))[..., 0]


class Layer(nn.Module):
    """A layer of a transformer, its sublayers in series or side by side."""

    def __init__(self, parallel):
        super().__init__()
        self.parallel = parallel
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attn, self.mlp = Attention(), mlp()

    def forward(self, x):
        if self.parallel:
            h = self.norm1(x)
            return x + self.attn(h) + self.mlp(h)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def resnet(m, x):
    for i, f in enumerate(m.f):
        x = torch.relu(f(x) + (x if i != 1 else m.projection(x)))
    return x


def squeezed(m, x):
    for f, squeeze in zip(m.f, m.squeeze, strict=True):
        x = x + f(x) * torch.sigmoid(squeeze(x))
    return x


def dense(m, x):
    features = [x]
    for layer in m.f:
        features.append(layer(torch.cat(features, 1)))
    return m.narrow(torch.cat(features, 1))


def u_net(m, x):
    y = torch.tanh(m.f[0](x))
    z = torch.tanh(m.f[1](y))
    for g in m.bottom:
        z = z + g(z)
    y = m.up[1](torch.cat([y, torch.tanh(z)], 1))
    return m.up[0](torch.cat([x, torch.tanh(y)], 1))


def highway(m, x):
    for f, gate in zip(m.f, m.gate, strict=True):
        t = torch.sigmoid(gate(x))
        x = t * f(x) + (1 - t) * x
    return x


def rep_vgg(m, x):
    for i in range(3):
        y = m.f[i](x) + m.g[i](x)
        x = torch.relu(y if i == 0 else y + m.norm[i](x))
    return x


def nested(m, x):
    """A residual block inside a branch, twice, and one more after it."""
    for f, g, out in zip(m.f, m.g, m.after, strict=True):
        h = f(x)
        x = x + out(h + g(h))
    return x + m.last(x)


def ends_in_a_block(m, x):
    """The branch's last operation is itself an addition: no operation stands between both merges."""
    for f, g in zip(m.f, m.g, strict=True):
        h = f(x)
        x = x + (h + g(h))
    return x


def side_by_side(m, x):
    for f, g in zip(m.f, m.g, strict=True):
        x = f(x) + x + g(x)
    return x


def tied(m, x):
    for _ in range(4):
        x = x + m.f(x)
    return x


def stages(m, x):
    for layer in m.layers:
        x = layer(x)
    return x


def linears(*sizes):
    return [nn.Linear(*size) for size in sizes]


def mlps(count, layers=2):
    return [mlp(4, layers) for _ in range(count)]


BRANCHES = r"(f|g|bottom)(\.\d+)?|last"
EXAMPLES = {
    # name: (model, branches, the polynomial that can be read off the drawing)
    "two residual blocks": (lambda: Net(resnet, f=mlps(2), projection=nn.Linear(4, 4)), [1, 2, 1]),
    "three residual blocks": (lambda: Net(resnet, f=mlps(3, 3), projection=nn.Linear(4, 4)), [1, 3, 3, 1]),
    "squeeze and excitation": (lambda: Net(squeezed, f=mlps(3), squeeze=linears(*[(4, 4)] * 3)), [1, 3, 3, 1]),
    "DenseNet": (lambda: Net(dense, f=linears((4, 2), (6, 2), (8, 2)), narrow=nn.Linear(10, 4)), [1, 3, 3, 1]),
    "U-Net": (
        lambda: Net(u_net, f=linears((4, 3), (3, 2)), bottom=linears((2, 2), (2, 2)), up=linears((8, 4), (5, 4))),
        [1, 1, 1, 2, 1],
    ),
    "highway": (lambda: Net(highway, f=mlps(3), gate=linears(*[(4, 4)] * 3)), [1, 3, 3, 1]),
    "RepVGG": (
        lambda: Net(
            rep_vgg, f=linears(*[(4, 4)] * 3), g=linears(*[(4, 4)] * 3), norm=[nn.BatchNorm1d(4) for _ in range(3)]
        ),
        [0, 2, 8, 8],
    ),
    "nested": (lambda: Net(nested, f=mlps(2), g=mlps(2), after=mlps(2), last=mlp()), [1, 3, 5, 5, 3, 1]),
    "a branch that ends in a block": (lambda: Net(ends_in_a_block, f=mlps(2), g=mlps(2)), [1, 2, 3, 2, 1]),
    "branches side by side": (lambda: Net(side_by_side, f=mlps(3, 1), g=mlps(3, 3)), [1, 6, 12, 8]),
    "tied weights": (lambda: Net(tied, f=mlp()), [1, 4, 6, 4, 1]),
}


def build(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def example():
    return torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EXAMPLES)
def test_paths_are_the_routes_of_the_exported_graph(name):
    make, drawn = EXAMPLES[name]
    model = build(make)
    found = routes(model, example(), named(BRANCHES), named(r"gate\.\d+|squeeze\.\d+"))
    chain = rp.unravel(model, example())
    assert rp.path_histogram(chain).num_paths.tolist() == by_length(map(len, found)) == drawn
    assert chain.num_paths == len(found) == len(set(found))
    if not any(isinstance(c, tuple) for offered in chain.path_choices for c in offered):
        layers = [sum(weight_layers(model, name) for name in route) for route in found]
        assert rp.path_histogram(chain, "weight_layer").num_paths.tolist() == by_length(layers)


@pytest.mark.parametrize(("parallel", "drawn"), [(False, [1, 6, 9]), (True, [1, 4, 4])])
def test_lengths_of_a_transformer_in_every_unit(parallel, drawn):
    model = build(lambda: Net(stages, layers=[Layer(parallel) for _ in range(2)]))
    found = routes(model, example(), named(r"layers\.\d+\.(attn|mlp)"))
    chain = rp.unravel(model, example())
    blocks = [len(route) for route in found]
    transformer_layers = [len({name.rsplit(".", 1)[0] for name in route}) for route in found]
    # One of q, k and v, and o; both maps of the MLP.
    layers = [2 * len(route) for route in found]
    assert rp.path_histogram(chain, "block").num_paths.tolist() == by_length(blocks)
    assert rp.path_histogram(chain, "transformer_layer").num_paths.tolist() == by_length(transformer_layers) == drawn
    assert rp.path_histogram(chain, "weight_layer").num_paths.tolist() == by_length(layers)


class WaveLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.residual, self.skip = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.gate(x)) * torch.sigmoid(x)
        return self.residual(h), self.skip(h)


def wave_net(m, x):
    total = 0
    for layer in m.f:
        residual, skip = layer(x)
        x, total = x + residual, total + skip
    return torch.relu(total)


def test_the_path_of_a_wavenet_without_any_branch_reads_the_empty_sum():
    model = build(lambda: Net(wave_net, f=[WaveLayer() for _ in range(4)]))
    found = by_length(map(len, routes(model, example(), named(r"f\.\d+"))))
    assert found == [0, 4, 6, 4, 1]
    chain = rp.unravel(model, example())
    assert rp.path_histogram(chain).num_paths.tolist() == [1, *found[1:]]
    # The one path that is no route of the graph: what it returns depends on no input.
    empty = rp.path_network(chain, (False,) * 4)
    assert torch.equal(empty(example()), model.out(torch.zeros(2, 4, dtype=torch.float64)))


class Drawn(nn.Module):
    """Blocks drawn at random: each has an identity skip and one or two branches, which may hold such blocks again."""

    def __init__(self, rng, depth=0):
        super().__init__()
        self.kinds = [
            rng.choice(["branch", "two", "inner"] if depth < 2 else ["branch", "two"])
            for _ in range(rng.randint(1, 3 - depth))
        ]
        self.first = nn.ModuleList(nn.Linear(4, 4) for _ in self.kinds)
        self.second = nn.ModuleList(nn.Linear(4, 4) for _ in self.kinds)
        self.inner = nn.ModuleList(Drawn(rng, depth + 1) if kind == "inner" else nn.Identity() for kind in self.kinds)
        self.after = nn.ModuleList(nn.Linear(4, 4) for _ in self.kinds)

    def forward(self, x):
        for kind, f, g, inner, after in zip(self.kinds, self.first, self.second, self.inner, self.after, strict=True):
            x = f(x) + x + g(x) if kind == "two" else x + after(torch.tanh(inner(f(x))))
            x = torch.tanh(x)
        return x


@pytest.mark.parametrize("seed", range(4))
def test_random_series_parallel_networks(seed):
    model = build(lambda: Net(lambda m, x: m.blocks(x), blocks=Drawn(random.Random(seed))))
    found = routes(model, example(), named(r"(.*\.)?(first|second)\.\d+"))
    chain = rp.unravel(model, example())
    assert rp.path_histogram(chain).num_paths.tolist() == by_length(map(len, found))
    assert chain.num_paths == len(found)

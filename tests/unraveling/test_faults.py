"""Structures that are easily read wrong: blocks, deletions and gradients are those of the model, or it is refused.

Every expected value is made in plain PyTorch: by hooks that zero a module, by the network's own function with a branch
left out, by autograd with the gradient through branches gated (`tests.unraveling.networks`).
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import resnet_paths as rp
from tests.unraveling.networks import (
    TARGETS,
    WIDTH,
    Net,
    draw,
    gradient_shares,
    linear,
    linears,
    network,
    without,
    zeroed,
)

X = draw(4, WIDTH)


def found_or_refused(model, example, *named):
    """The chain; None if the model is refused by a message that has one of the words `named` in it."""
    message = ""
    try:
        return rp.unravel(model, example)
    except rp.ResnetPathsError as error:
        message = str(error)
    assert not named or any(word in message for word in named), message
    return None


def names_in(chain):
    return chain.to_frame().block.tolist()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def assert_shares(chain, model, inputs, longest):
    expected = gradient_shares(model, inputs, longest)
    batch = inputs[0] if len(inputs) == 1 else tuple(inputs)
    frame = rp.gradient_by_path_length(chain, batch, TARGETS, progress=False)
    assert frame.gradient_share.tolist() == pytest.approx(expected, abs=1e-10)


# A second tower


def tower(layers, h, add):
    for layer in layers:
        h = add(h, torch.tanh(layer(h)))
    return h


def siamese(m, a, b, add=torch.add):
    return m.head((tower(m.f, a, add) - tower(m.f, b, add)).abs())


def two_cameras(m, a, b, add=torch.add):
    return m.head(torch.cat([tower(m.f, m.left(a), add), tower(m.g, m.right(b), add)], 1))


def late_fusion(m, a, b, add=torch.add):
    """One tower runs into the other's state."""
    return m.head(tower(m.f, m.left(a) + tower(m.g, m.right(b), add), add))


@pytest.mark.parametrize("depth", [1, 2])
def test_siamese_towers(depth):
    model, pair = network(siamese, f=linears(depth), head=linear(WIDTH, 3)), (X, draw(4, WIDTH, seed=1))
    chain = found_or_refused(model, pair, "argument 1", "tower", "f.0")
    if chain is not None:
        assert_shares(chain, model, pair, depth)
        for i, layer in enumerate(model.f):
            both = [name for name in names_in(chain) if name.split("@")[0] == f"f.{i}"]
            with zeroed(layer):
                close(rp.delete_blocks(chain, both)(*pair), model(*pair))


@pytest.mark.parametrize(
    "run",
    [two_cameras, late_fusion],
)
def test_towers_with_weights_of_their_own(run):
    parts = {"left": linear(), "right": linear(), "f": linears(2), "g": linears(2)}
    model = network(run, head=linear(2 * WIDTH if run is two_cameras else WIDTH, 3), **parts)
    pair = X, draw(4, WIDTH, seed=1)
    chain = found_or_refused(model, pair, "argument 1", "tower", "g.0", "right")
    if chain is not None:
        assert {"f.0", "f.1", "g.0", "g.1"} <= set(names_in(chain))
        for name in ("f.0", "f.1", "g.0", "g.1"):
            with zeroed(model.get_submodule(name)):
                close(rp.delete_block(chain, name)(*pair), model(*pair))


# Which operand is the skip


class Experts(nn.Module):
    """Two linear maps in one parameter, mixed by a router."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.router = nn.Linear(width, 2)
        self.weights = nn.Parameter(torch.randn(2, width, width))

    def forward(self, x):
        each = torch.einsum("...i,eij->...ej", x, self.weights)
        return (torch.softmax(self.router(x), -1)[..., None] * each).sum(-2)


class Fourier(nn.Module):
    """Learned filters of the lowest frequencies."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 3, WIDTH))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.complex(*self.weights), n=x.shape[1], dim=1)


class Deformable(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.offset = nn.Conv2d(width, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(x, self.offset(x))


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def beside(m, x, add=torch.add):
    h = m.stem(x)
    return m.head(add(m.proj(h), m.body(h)))


HEAVY = {
    "lstm": lambda: First(nn.LSTM(WIDTH, WIDTH, batch_first=True)),
    "gru": lambda: First(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "experts": Experts,
    "fourier": Fourier,
    "attention": lambda: First(
        Net(lambda m, x: m.inner(x, x, x), inner=nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        "lstm",
        "gru",
        "experts",
        "fourier",
        "attention",
    ],
)
@pytest.mark.parametrize("first", ["proj", "body"])
def test_the_heavier_operand_is_the_branch(kind, first):
    def run(m, x):
        h = m.stem(x)
        return m.head(m.proj(h) + m.body(h) if first == "proj" else m.body(h) + m.proj(h))

    model, x = network(run, stem=linear(), proj=linear(), body=HEAVY[kind], head=linear(WIDTH, 3)), draw(4, 4, WIDTH)
    chain = rp.unravel(model, x)
    assert len(chain) == 1
    with zeroed(model.body):
        close(rp.delete_block(chain, 0)(x), model(x))
    assert chain[0].name.startswith("body")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (Deformable, "body"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), "body"),
    ],
)
def test_a_convolution_beside_a_1x1_shortcut_can_be_deleted(body, name):
    parts = {"stem": lambda: nn.Conv2d(3, 4, 1), "proj": lambda: nn.Conv2d(4, 4, 1), "head": lambda: nn.Conv2d(4, 2, 1)}
    model, x = network(beside, body=body, **parts), draw(2, 3, 8, 8)
    chain = rp.unravel(model, x)
    assert (chain[0].name, chain[0].skip_kind) == (name, "projection")
    with zeroed(model.body):
        close(rp.delete_block(chain, 0)(x), model(x))


@pytest.mark.parametrize("name", ["shortcut", "downsample", "proj", "residual", "skip"])
@pytest.mark.parametrize("first", [True, False])
def test_at_a_tie_names_decide(name, first):
    def run(m, x):
        h = m.stem(x)
        skip, branch = getattr(m, name)(h), m.f(h)
        return m.head(skip + branch if first else branch + skip)

    model = network(run, stem=linear(), f=linear(), head=linear(WIDTH, 3), **{name: linear()})
    chain = rp.unravel(model, X)
    with zeroed(model.f):
        close(rp.delete_block(chain, 0)(X), model(X))


def both_maps(m, x):
    h = m.stem(x)
    return m.head(m.branch0(h) + m.branch1(h))


@pytest.mark.parametrize(("skip", "branch"), [("branch0", "branch1"), ("branch1", "branch0")])
def test_at_a_tie_the_caller_decides(skip, branch):
    model = network(both_maps, stem=linear(), branch0=linear(), branch1=linear(), head=linear(WIDTH, 3))
    chain = rp.unravel(model, X, skip=skip)
    assert (chain[0].name, chain[0].skip_kind, chain.num_paths) == (branch, "projection", 2)
    with zeroed(model.get_submodule(branch)):
        close(rp.delete_block(chain, 0)(X), model(X))


# Additions off the trunk


def normed(activation):
    return lambda: nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), activation()) for _ in range(4))


def reversible(m, x, add=torch.add):
    x = m.stem(x)
    for i in (0, 2):
        a, b = x.chunk(2, 1)
        a = add(a, m.f[i](b))
        x = torch.cat([a, add(b, m.f[i + 1](a))], 1)
    return m.head(x)


def cross_stage(m, x, add=torch.add):
    """As C2f of YOLO: every state of a chain is kept and all are joined."""
    parts = list(m.stem(x).chunk(2, 1))
    for layer in m.f[:2]:
        parts.append(add(parts[-1], layer(parts[-1])))
    return m.head(torch.cat(parts, 1))


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
@pytest.mark.parametrize(("run", "longest"), [(reversible, 4), (cross_stage, 2)])
def test_additions_off_the_trunk_are_found_or_refused(run, longest, activation):
    model = network(run, stem=linear(), f=normed(activation), head=linear(WIDTH if run is reversible else 2 * WIDTH, 3))
    chain = found_or_refused(model, X)
    assert (chain is None) == (run is reversible)
    if chain is not None:
        assert chain.num_paths == 2**longest
        assert_shares(chain, model, [X], longest)
        for i in range(longest):
            with zeroed(model.f[i]):
                expected = model(X)
            close(rp.delete_block(chain, i)(X), expected)


def cross_stages(m, x, add=torch.add):
    """Two such modules in a row, each followed by a layer, and a residual block between them."""
    for i in (0, 1):
        parts = list(m.stem[i](x).chunk(2, 1))
        for layer in m.f[2 * i : 2 * i + 2]:
            parts.append(add(parts[-1], layer(parts[-1])))
        x = m.join[i](torch.cat(parts, 1))
        x = add(x, torch.tanh(m.g[i](x))) if i == 0 else x
    return m.head(torch.relu(x))


def test_gathered_states_in_the_middle_of_a_network():
    model = network(
        cross_stages,
        stem=linears(2),
        f=normed(nn.ReLU),
        join=lambda: nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2)),
        g=linears(2),
        head=linear(WIDTH, 3),
    )
    chain = rp.unravel(model, X)
    assert names_in(chain) == ["f.0", "f.1", "g.0", "f.2", "f.3"]
    assert_shares(chain, model, [X], 5)
    for i, module in enumerate([model.f[0], model.f[1], model.g[0], model.f[2], model.f[3]]):
        with zeroed(module):
            expected = model(X)
        close(rp.delete_block(chain, i)(X), expected)
        close(chain.run_with_cache(X)[0], model(X))


# Activations and norms with parameters


class Snake(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.full((WIDTH,), 1.5))

    def forward(self, x):
        return x + torch.sin(self.rate * x) ** 2 / self.rate


class ResponseNorm(nn.Module):
    """GRN of ConvNeXt V2."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        norm = x.norm(dim=-1, keepdim=True) * x.abs()
        return x + self.bias + self.weight * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6))


class WrittenPReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x):
        return torch.relu(x) + self.slope * (x - x.abs()) / 2


class LeakySkip(nn.Module):
    """x plus a learned multiple of its norm's output: LayerScale on what holds no weight layer."""

    def __init__(self):
        super().__init__()
        self.gamma, self.norm = nn.Parameter(torch.full((WIDTH,), 0.2)), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.gamma * self.norm(x)


def before(m, x, add=torch.add):
    for act, layer in zip(m.acts, m.layers, strict=True):
        x = add(x, m.scale * layer(act(x)))
    return m.head(x)


def inside(m, x, add=torch.add):
    for act, layer in zip(m.acts, m.layers, strict=True):
        x = add(x, layer(act(layer(x))))
    return m.head(x)


def after(m, x, add=torch.add):
    x = m.stem(x)
    for act, layer in zip(m.acts, m.layers, strict=True):
        x = act(add(x, m.scale * layer(x)))
    return m.head(x)


def on_the_trunk(m, x, add=torch.add):
    for act, layer in zip(m.acts, m.layers, strict=True):
        h = act(x)
        x = add(h, layer(h))
    return m.head(x)


@pytest.mark.parametrize("activation", [Snake, ResponseNorm, WrittenPReLU, LeakySkip])
@pytest.mark.parametrize("run", [before, inside, after, on_the_trunk])
def test_what_adds_x_without_a_weight_layer_is_no_block(run, activation):
    model = network(
        run,
        stem=linear(),
        acts=lambda: nn.ModuleList(activation() for _ in range(2)),
        layers=linears(2),
        scale=lambda: nn.Parameter(torch.ones(WIDTH)),
        head=linear(WIDTH, 3),
    )
    chain = rp.unravel(model, X)
    assert names_in(chain) == ["layers.0", "layers.1"]
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 2, 1]
    for i in range(2):
        close(rp.delete_block(chain, i)(X), model.run(model, X, add=without(i)))
    assert_shares(chain, model, [X], 2)


# Names


def gathered(m, x, add=torch.add):
    """As ECAPA-TDNN: the head reads the states after all blocks."""
    states = []
    for layer in m.layers:
        x = add(x, torch.relu(layer(x)))
        states.append(x)
    return m.head(torch.cat(states, 1))


def test_a_name_finds_one_block_of_the_whole_tree():
    model = network(gathered, layers=linears(3), head=linear(3 * WIDTH, 3))
    chain = rp.unravel(model, X)
    names = names_in(chain)
    assert len(set(names)) == len(names)
    assert {"layers.0", "layers.1", "layers.2"} <= set(names)
    for i in range(3):
        with zeroed(model.layers[i]):
            expected = model(X)
        close(rp.delete_block(chain, f"layers.{i}")(X), expected)
        close(rp.scale_block(chain, f"layers.{i}", 0)(X), expected)


def test_states_that_the_head_gathers_make_no_path_longer():
    model = network(gathered, layers=linears(3), head=linear(3 * WIDTH, 3))
    assert_shares(rp.unravel(model, X), model, [X], 3)


def u_net(m, x, order=(0, 1, 2)):
    h = torch.tanh(m.stem(x))
    z = torch.tanh(m.down(h))
    for i in order:
        z = z + torch.tanh(m.body[i](z))
    return m.head(h + torch.tanh(m.up(z)))


def test_a_position_beside_a_name_is_that_of_the_chain_which_was_given():
    model = network(
        u_net, stem=linear(), down=linear(WIDTH, 3), body=linears(3, 3), up=linear(3, WIDTH), head=linear(WIDTH, 3)
    )
    chain = rp.unravel(model, X)
    assert {"body.0", "body.1", "body.2"} <= set(names_in(chain))
    close(rp.swap_blocks(chain, "body.1", "body.0")(X), model.run(model, X, order=(1, 0, 2)))
    close(rp.swap_blocks(chain, chain[0].name, 0)(X), model(X))


def test_a_block_inside_is_not_swapped_with_one_outside():
    model = network(
        u_net, stem=linear(), down=linear(WIDTH, 3), body=linears(3, 3), up=linear(3, WIDTH), head=linear(WIDTH, 3)
    )
    chain = rp.unravel(model, X)
    with pytest.raises(rp.ResnetPathsError):
        rp.swap_blocks(chain, "body.1", 0)


# What follows the addition


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


def closing(activation):
    """Blocks whose addition is a module of its own, with an activation after it."""
    return lambda: nn.ModuleList(
        Net(lambda m, x: m.act(m.add(x, m.f(x))), f=nn.Linear(WIDTH, WIDTH), add=Sum(), act=activation())
        for _ in range(3)
    )


def in_series(m, x, order=(0, 1, 2)):
    x = m.stem(x)
    for i in order:
        x = m.blocks[i](x)
    return m.head(x)


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LayerNorm(WIDTH)])
def test_what_follows_the_addition_belongs_to_its_block(activation):
    model = network(in_series, stem=linear(), blocks=closing(activation), head=linear(WIDTH, 3))
    chain = rp.unravel(model, X)
    assert len(chain) == 3
    for i in range(3):
        order = [0, 1, 2]
        order.insert(i, i)
        close(rp.duplicate_block(chain, i)(X), model.run(model, X, order=order))
        with zeroed(model.blocks[i].f):
            close(rp.delete_block(chain, i)(X), model(X))
    for pair, order in {(0, 1): (1, 0, 2), (0, 2): (2, 1, 0), (1, 2): (0, 2, 1)}.items():
        close(rp.swap_blocks(chain, *pair)(X), model.run(model, X, order=order))


def with_a_plain_module(m, x, order=(0, 1, 2, 3), at=2):
    x = m.stem(x)
    for place, i in enumerate(order):
        if place == at:
            x = torch.tanh(m.plain(x))
        x = x + torch.tanh(m.layers[i](x))
    return m.head(x)


def test_a_plain_module_between_two_blocks_stays_where_it_is():
    model = network(with_a_plain_module, stem=linear(), layers=linears(4), plain=linear(), head=linear(WIDTH, 3))
    chain = rp.unravel(model, X)
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 4, 6, 4, 1]
    for i in range(4):
        with zeroed(model.layers[i]):
            close(rp.delete_block(chain, f"layers.{i}")(X), model(X))
    close(rp.duplicate_block(chain, "layers.2")(X), model.run(model, X, order=(0, 1, 2, 2, 3)))
    close(rp.duplicate_block(chain, "layers.1")(X), model.run(model, X, order=(0, 1, 1, 2, 3), at=3))
    close(rp.swap_blocks(chain, "layers.2", "layers.3")(X), model.run(model, X, order=(0, 1, 3, 2)))
    close(rp.swap_blocks(chain, "layers.1", "layers.2")(X), model.run(model, X, order=(0, 2, 1, 3)))

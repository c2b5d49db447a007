"""What stands beside the trunk, read as the model has it: alternatives that hold chains, inputs that blocks or the head
read, encoders, states of earlier layers; and the names of branches.

Expected values are made as in `tests.unraveling.test_faults`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
from tests.unraveling.test_faults import X, assert_shares, close, found_or_refused, names_in


def deleted_by_name(chain, name, *inputs):
    """The output without a module's calls: the second is named ``name@1``, and so on."""
    calls = [block for block in names_in(chain) if block.split("@")[0] == name]
    assert calls, (name, names_in(chain))
    with torch.no_grad():
        return rp.delete_blocks(chain, calls)(*inputs)


# Chains inside one of several alternatives


def cross_stage(m, x, add=torch.add):
    """Two C3 blocks of YOLO, of two and three bottlenecks."""
    x = m.stem(x)
    for stage, places in enumerate([(0, 1), (2, 3, 4)]):
        h = torch.tanh(m.first[stage](x))
        for i in places:
            h = add(h, torch.tanh(m.body[i](h)))
        x = torch.tanh(m.last[stage](torch.cat([h, torch.tanh(m.second[stage](x))], 1)))
    return m.head(x)


def to_half(number):
    return lambda: nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(number))


def test_chains_in_alternatives_of_a_cross_stage_network():
    model = network(
        cross_stage,
        stem=linear(),
        first=to_half(2),
        second=to_half(2),
        last=linears(2),
        body=linears(5, 3),
        head=linear(WIDTH, 3),
    )
    chain = rp.unravel(model, X)
    assert chain.num_paths == (4 + 1) * (8 + 1)
    for i in range(5):
        with zeroed(model.body[i]):
            close(deleted_by_name(chain, f"body.{i}", X), model(X))


def test_the_gradient_through_alternatives_that_hold_chains():
    parts = {"stem": linear(), "first": to_half(2), "second": to_half(2), "last": linears(2)}
    model = network(cross_stage, body=linears(5, 3), head=linear(WIDTH, 3), **parts)
    frame = rp.gradient_by_path_length(rp.unravel(model, X), X, TARGETS, progress=False)
    # Every path takes one alternative of each of the two stages, and so has two blocks more than bottlenecks.
    assert frame.path_length.tolist() == [2, 3, 4, 5, 6, 7]
    assert frame.gradient_share.tolist() == pytest.approx(gradient_shares(model, [X], 5), abs=1e-10)


def atrous_pyramid(m, x, add=torch.add):
    """As DeepLabV3+: the decoder joins an early feature with a pyramid after the encoder."""
    low = x = m.stem(x)
    for layer in m.layers:
        x = add(x, torch.tanh(layer(x)))
    pyramid = torch.cat([torch.tanh(layer(x)) for layer in m.pyramid], 1)
    return m.head(torch.cat([m.low(low), torch.tanh(m.project(pyramid))], 1))


def test_the_encoder_beside_a_low_level_feature():
    parts = {"stem": linear(), "layers": linears(6), "pyramid": linears(3), "low": linear(WIDTH, 2)}
    model = network(atrous_pyramid, project=linear(3 * WIDTH, WIDTH), head=linear(WIDTH + 2, 3), **parts)
    chain = rp.unravel(model, X)
    assert chain.num_paths == 1 + 2**6 * 3
    for i in range(6):
        with zeroed(model.layers[i]):
            close(deleted_by_name(chain, f"layers.{i}", X), model(X))


def two_flips(m, x):
    def net(x):
        x = m.stem(x)
        for layer in m.layers:
            x = x + torch.tanh(layer(x))
        return m.head(x)

    return (net(x) + net(x.flip(1))) / 2


def test_the_mean_over_two_flips():
    model = network(two_flips, stem=linear(), layers=linears(3), head=linear(WIDTH, 3))
    chain = rp.unravel(model, X)
    assert chain.num_paths == 2 * 2**3
    for i in range(3):
        with zeroed(model.layers[i]):
            close(deleted_by_name(chain, f"layers.{i}", X), model(X))


# Context


def masked(m, x, mask, add=torch.add):
    for layer in m.layers:
        x = add(x, layer(x) * mask)
    return m.head(x)


@pytest.mark.parametrize("shape", [(4, 1), (4, WIDTH)])
def test_no_stem_and_a_mask(shape):
    model, mask = network(masked, layers=linears(3), head=linear(WIDTH, 3)), draw(*shape, seed=2)
    chain = rp.unravel(model, (X, mask))
    close(chain(X, mask), model(X, mask))
    close(chain(torch.cat([X, X]), torch.cat([mask, -mask])), model(torch.cat([X, X]), torch.cat([mask, -mask])))
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 3, 3, 1]
    for i in range(3):
        with zeroed(model.layers[i]):
            close(deleted_by_name(chain, f"layers.{i}", X, mask), model(X, mask))


def mask_and_positions(m, x, mask, positions, add=torch.add):
    """The mask is indexed by the batch size of the first input, as transformers builds its masks."""
    mask = mask[torch.arange(x.shape[0])]
    x = m.stem(x)
    for layer in m.layers:
        x = add(x, layer(x) * mask + torch.sin(positions))
    return m.head(x)


def test_mask_and_positions_together():
    model = network(mask_and_positions, stem=linear(), layers=linears(3), head=linear(WIDTH, 3))
    inputs = X, draw(4, WIDTH, seed=2), draw(4, WIDTH, seed=3)
    chain = rp.unravel(model, inputs)
    more = [torch.cat([x, x.flip(0)]) for x in inputs]
    close(chain(*more), model(*more))
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 3, 3, 1]
    for i in range(3):
        close(rp.delete_block(chain, i)(*inputs), model.run(model, *inputs, add=without(i)))


@pytest.mark.parametrize(("run", "shapes"), [(masked, [(4, 1)]), (mask_and_positions, [(4, WIDTH), (4, WIDTH)])])
def test_gradients_at_all_inputs_of_blocks_that_read_some(run, shapes):
    model = network(run, stem=linear(), layers=linears(3), head=linear(WIDTH, 3))
    batch = X, *(draw(*shape, seed=seed) for seed, shape in enumerate(shapes, 2))
    assert_shares(rp.unravel(model, batch), model, batch, 3)


def tokens_of(batch=4, length=7, seed=0):
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def last_token(m, tokens, add=torch.add):
    """The logits of the last token that is none of padding, as in GPT2ForSequenceClassification."""
    x = m.words(tokens)
    for layer in m.layers:
        x = add(x, torch.tanh(layer(x)))
    places = torch.arange(tokens.shape[-1], device=tokens.device, dtype=torch.int32)
    last = ((tokens != 0).int() * places).argmax(-1)
    return m.head(x)[torch.arange(tokens.shape[0], device=tokens.device), last]


def test_a_head_that_looks_for_the_last_token():
    model = network(last_token, words=lambda: nn.Embedding(40, WIDTH), layers=linears(3), head=linear(WIDTH, 3))
    tokens = tokens_of()
    tokens[0, 4:] = tokens[2, 1:] = 0
    chain = rp.unravel(model, tokens)
    other = tokens_of(6, seed=1)
    other[3:, 2:] = 0
    close(chain(other), model(other))
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 3, 3, 1]
    for i in range(3):
        with zeroed(model.layers[i]):
            close(deleted_by_name(chain, f"layers.{i}", other), model(other))


class Pooled(nn.Module):
    """`nn.TransformerEncoder` on embedded tokens, and the mean over those that are none of padding."""

    def __init__(self, norm_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x, padding):
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = ~padding[..., None]
        return self.head((x * kept).sum(1) / kept.sum(1))


@pytest.mark.parametrize("norm_first", [True, False])
def test_padding_mask_of_a_transformer_encoder(norm_first):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Pooled(norm_first).double().eval()
    x = draw(4, 5, 8)
    padding = torch.arange(5) >= torch.tensor([5, 2, 3, 1])[:, None]
    chain = rp.unravel(model, (x, padding))
    for mask in (padding, padding.flip(0), torch.zeros_like(padding)):
        close(chain(x, mask), model(x, mask))
    assert rp.path_histogram(chain).num_paths.tolist() == [1, 6, 15, 20, 15, 6, 1]
    for i, layer in enumerate(model.encoder.layers):
        for name, module in ((f"encoder.layers.{i}.self_attn", layer.self_attn), (None, layer.linear2)):
            # In eval mode layers take a fast path that hooks would not reach: gradients turn it off.
            with zeroed(module), torch.enable_grad():
                expected = model(x.clone().requires_grad_(), padding).detach()
            index = 2 * i + (name is None)
            close(rp.delete_block(chain, index)(x, padding), expected)


# What every layer reads again


def x0_skips(m, x, add=torch.add):
    """As modded-nanogpt: every layer mixes the embedding into the state."""
    x = x0 = m.stem(x)
    for i in range(6):
        x = m.mix[i][0] * x + m.mix[i][1] * x0
        x = add(x, torch.tanh(m.a[i](x)))
        x = add(x, torch.tanh(m.b[i](x)))
    return m.head(x)


def per_layer_embeddings(m, x, add=torch.add):
    """As Gemma 3n: each layer has its own embedding of the input, which its last addition gates."""
    each = m.embed(x).chunk(4, 1)
    x = m.stem(x)
    for i in range(4):
        x = add(x, torch.tanh(m.a[i](x)))
        x = add(x, m.b[i](torch.sigmoid(m.gate[i](x)) * each[i]))
    return m.head(x)


def value_residual(m, x, add=torch.add):
    """As RWKV-7: every layer mixes the first layer's value into its own."""
    x, first = m.stem(x), None
    for i in range(4):
        value = m.gate[i](x)
        first = value if first is None else first
        x = add(x, m.a[i](torch.sigmoid(x) * (value + 0.5 * first)))
        x = add(x, torch.tanh(m.b[i](x)))
    return m.head(x)


@pytest.mark.parametrize(
    ("run", "additions", "named"),
    [
        (x0_skips, 12, ("stem", "mul")),
        (per_layer_embeddings, 8, ("embed", "chunk", "split")),
        (value_residual, 8, ("gate.0",)),
    ],
)
def test_what_every_layer_reads_again_is_counted_right_or_refused_by_name(run, additions, named):
    model = network(
        run,
        stem=linear(),
        embed=linear(WIDTH, 4 * WIDTH),
        mix=lambda: nn.ParameterList(torch.tensor([0.9, 0.3]) for _ in range(6)),
        a=linears(6),
        b=linears(6),
        gate=linears(6),
        head=linear(WIDTH, 3),
    )
    chain = found_or_refused(model, X, *named)
    if chain is not None:
        assert len(names_in(chain)) == additions
        assert rp.path_histogram(chain).num_paths.sum() == 2**additions
        for i, name in enumerate(names_in(chain)):
            close(rp.delete_block(chain, name)(X), model.run(model, X, add=without(i)))
        assert_shares(chain, model, [X], additions)


# Names of what a branch is


def pre_norm(m, x):
    x = x + m.attention(m.norm1(x))
    return x + m.mlp(m.norm2(x))


class GatedExperts(nn.Module):
    """As in Mixtral or Qwen: a module named ``gate`` routes, the experts' weights are one parameter of the whole."""

    def __init__(self, router):
        super().__init__()
        self.add_module(router, nn.Linear(WIDTH, 2))
        self.router_name = router
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH))

    def forward(self, x):
        weights = torch.softmax(self.get_submodule(self.router_name)(x), -1)
        each = torch.einsum("...i,eij->...ej", x, self.experts)
        return (weights[..., None] * torch.tanh(each)).sum(-2)


def layers_of(mlp, **more):
    def made():
        return Net(
            pre_norm if not more else bare_function,
            norm1=nn.LayerNorm(WIDTH),
            attention=nn.Linear(WIDTH, WIDTH),
            norm2=nn.LayerNorm(WIDTH),
            **({"mlp": mlp()} if mlp else {name: part() for name, part in more.items()}),
        )

    return lambda: nn.ModuleList(made() for _ in range(3))


def stacked(m, x):
    x = m.stem(x)
    for layer in m.layers:
        x = layer(x)
    return m.head(x)


@pytest.mark.parametrize("router", ["gate", "router"])
def test_a_mixture_of_experts_is_named_for_the_whole(router):
    model = network(stacked, stem=linear(), layers=layers_of(lambda: GatedExperts(router)), head=linear(WIDTH, 3))
    chain = rp.unravel(model, X)
    assert names_in(chain) == [f"layers.{i}.{part}" for i in range(3) for part in ("attention", "mlp")]
    with zeroed(model.layers[1].mlp):
        close(rp.delete_block(chain, "layers.1.mlp")(X), model(X))


def bare_function(m, x):
    x = x + m.attention(m.norm1(x))
    return x + F.linear(F.gelu(F.linear(m.norm2(x), m.up)), m.down)


def test_a_bare_function_is_named_for_its_place():
    parameters = {name: lambda: nn.Parameter(torch.randn(WIDTH, WIDTH)) for name in ("up", "down")}
    model = network(stacked, stem=linear(), layers=layers_of(None, **parameters), head=linear(WIDTH, 3))
    chain = rp.unravel(model, X)
    names = names_in(chain)
    assert len(names) == 6
    for i in range(3):
        assert names[2 * i] == f"layers.{i}.attention"
        assert names[2 * i + 1].startswith(f"layers.{i}.")
        assert "#" not in names[2 * i + 1]

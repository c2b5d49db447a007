"""Chains against walks that share no code with them: over the exported graph, and over the operations as they run."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch import nn

import resnet_paths as rp
from tests.chains import inputs, plans, random_model
from tests.unraveling.additions import additions, output_without
from tests.unraveling.auditor import audit, by_length
from tests.unraveling.networks import WIDTH, draw, linear, linears, network
from tests.unraveling.test_faults import Snake, WrittenPReLU, close

X = draw(4, WIDTH)


def shortest_first(histogram):
    counts = histogram.num_paths.tolist()
    while not counts[0]:
        counts.pop(0)
    return counts


def assert_counts(chain, found):
    assert shortest_first(rp.path_histogram(chain)) == found.blocks
    frame = chain.to_frame()
    assert (frame.skip != "none").sum() == len(found.additions)
    if frame.depth.max() == 0:
        assert shortest_first(rp.path_histogram(chain, unit="weight_layer")) == found.weight_layers


def plain_residual(m, x):
    x = m.stem(x)
    for layer in m.a:
        x = x + torch.tanh(layer(x))
    return m.head(x)


def two_layers_each(m, x):
    x = m.stem(x)
    for first, second in zip(m.a, m.b, strict=True):
        x = torch.relu(x + second(torch.relu(first(x))))
    return m.head(x)


def with_projections(m, x):
    x = m.stem(x)
    for first, second, skip in zip(m.a, m.b, m.c, strict=True):
        x = skip(x) + second(torch.relu(first(x)))
    return m.head(x)


def squeeze_and_excite(m, x):
    x = m.stem(x)
    for layer, gate in zip(m.a, m.b, strict=True):
        y = layer(torch.relu(x))
        x = x + y * torch.sigmoid(gate(y))
    return m.head(x)


def snakes(m, x):
    x = m.stem(x)
    for layer in m.a:
        x = x + layer(m.snake(x))
    return m.head(m.prelu(x))


def nested(m, x):
    """As a U-Net: a network inside the branch of one block."""
    x = m.stem(x)
    z = torch.tanh(m.a[0](x))
    for layer in m.b:
        z = z + torch.tanh(layer(z))
    return m.head(x + torch.tanh(m.a[1](z)))


def normalised_after(m, x):
    x = m.stem(x)
    for layer in m.a:
        x = m.norm(x + torch.tanh(layer(x)))
    return m.head(x)


def attention(m, x):
    x = m.stem(x)
    for query, key, out in zip(m.a, m.b, m.c, strict=True):
        h = m.norm(x)
        x = x + out(nn.functional.scaled_dot_product_attention(query(h)[:, None], key(h)[:, None], h[:, None])[:, 0])
    return m.head(x)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (plain_residual, [1, 3, 3, 1]),
        (two_layers_each, [1, 3, 3, 1]),
        (with_projections, [1, 3, 3, 1]),
        (squeeze_and_excite, [1, 3, 3, 1]),
        (snakes, [1, 3, 3, 1]),
        (nested, [1, 1, 3, 3, 1]),
        (normalised_after, [1, 3, 3, 1]),
        (attention, [1, 3, 3, 1]),
    ],
)
def test_networks_written_by_hand(run, expected):
    parts = {name: linears(3) for name in "abc"}
    model = network(
        run,
        stem=linear(),
        head=linear(WIDTH, 3),
        snake=Snake,
        prelu=WrittenPReLU,
        norm=lambda: nn.LayerNorm(WIDTH),
        **parts,
    )
    found = audit(model, X)
    assert found.blocks == expected  # (1 + t)^3; 1 + t (1 + t)^3
    assert_counts(rp.unravel(model, X), found)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "regnet_y_400mf"])
def test_networks_of_torchvision(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_counts(rp.unravel(model, x), audit(model, x))


@pytest.mark.parametrize("family", ["Bert", "GPT2", "Llama", "ViT"])
def test_networks_of_transformers(family):
    hf = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    own = {
        "Bert": {"vocab_size": 50},
        "GPT2": {"vocab_size": 50, "use_cache": False},
        "Llama": {"vocab_size": 50, "num_key_value_heads": 1, "use_cache": False},
        "ViT": {"image_size": 16, "patch_size": 8},
    }[family]
    model = getattr(hf, f"{family}Model")(getattr(hf, f"{family}Config")(**small, **own)).eval()
    x = torch.randn(2, 3, 16, 16) if family == "ViT" else torch.randint(1, 50, (2, 5))
    chain, found = rp.unravel(model, x), audit(model, x)
    assert_counts(chain, found)
    assert len(found.additions) == 6


@settings(max_examples=6, deadline=None)
@given(plans(skips=("identity", "projection")))
def test_random_models(plan):
    model, x = random_model(plan), inputs()
    assert_counts(rp.unravel(model, x), audit(model, x))


@settings(max_examples=6, deadline=None)
@given(plans(skips=("identity", "projection")))
def test_deletions_of_random_models(plan):
    """Every block deleted, against a run of the model that leaves its branch out of the addition."""
    model, x = random_model(plan), inputs()
    output, found = additions(model, (x,), lambda y: y)
    chain = rp.unravel(model, x)
    assert len(chain) == len(found)
    close(chain(x), output.clone())
    for block, addition in zip(chain, found, strict=True):
        assert addition.on_trunk
        assert block.name in addition.modules
        close(rp.delete_block(chain, block.name)(x), output_without(model, (x,), lambda y: y, addition).clone())


def test_lengths_start_at_the_shortest_route():
    assert by_length({3: 1, 5: 2}) == [1, 0, 2]

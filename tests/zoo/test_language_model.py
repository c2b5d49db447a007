"""The small language model: causal, GPT-2's arrangement, a chain like any other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.zoo.initialisation import initialise
from resnet_paths.zoo.language import LanguageModel
from resnet_paths.zoo.vit import Attention


def model():
    made = LanguageModel(num_layers=2, width=16, num_heads=4, context=12)
    initialise(made, torch.Generator().manual_seed(0))
    return made.eval()


def text(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


def test_no_position_sees_what_comes_after_it():
    net, before = model(), text(3, 12)
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 256
    with torch.no_grad():
        difference = (net.at_every_position(before) - net.at_every_position(after)).abs().amax((0, 2))
        assert torch.equal(difference[:7], torch.zeros(7))
        assert (difference[7:] > 0).all()
        assert torch.equal(net(before), net.at_every_position(before)[:, -1])
        # Products of other sizes may round in another order.
        torch.testing.assert_close(net.at_every_position(before)[:, 4], net(before[:, :5]))


def test_causal_attention_is_that_of_torch():
    torch.manual_seed(0)
    attention = Attention(16, 4, is_causal=True)
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    reference.load_state_dict({
        "in_proj_weight": attention.qkv.weight,
        "in_proj_bias": attention.qkv.bias,
        "out_proj.weight": attention.out.weight,
        "out_proj.bias": attention.out.bias,
    })
    x = torch.randn(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(attention(x), reference(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_it_unravels_into_attention_and_mlp_and_says_the_same():
    net, inputs = model(), text(3, 12)
    chain = rp.unravel(net, inputs[:1])
    assert [block.name for block in chain] == [f"layers.{i}.{part}" for i in range(2) for part in ("attention", "mlp")]
    assert chain.num_paths == 16
    with torch.inference_mode():
        assert torch.equal(chain(inputs), net(inputs))


def test_every_weight_has_its_first_value():
    net = model()
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())
    assert 0.015 < net.tokens.weight.std() < 0.025
    assert not net.out.bias.any()


@pytest.fixture(scope="module")
def shipped():
    """The shipped network in float64, two windows of held-out text, and the tokens that follow."""
    windows = [rp.load_dataset("python-docs")[i] for i in (10, 300)]
    return rp.load_network("gpt-small").double(), *(torch.stack(parts) for parts in zip(*windows, strict=True))


def loss_without(model, layers, inputs, targets):
    """Nats per token by plain PyTorch: hooks return what each deleted layer was given."""
    hooks = [model.layers[i].register_forward_hook(lambda module, given, result: given[0]) for i in layers]
    try:
        with torch.no_grad():
            logits = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean().item()


def test_the_shipped_network_predicts_what_it_states(shipped):
    """Below 2 bits per byte, where 3-grams of bytes need 2.9, on two windows of 18 documents."""
    model, inputs, targets = shipped
    token_bytes = rp.load_dataset("python-docs").tokenizer.token_bytes
    num_bytes = sum(len(token_bytes[token]) for token in targets.flatten())
    bits = loss_without(model, [], inputs, targets) * targets.numel() / math.log(2) / num_bytes
    assert 1.0 < bits < 2.2
    row = rp.list_networks().set_index("name").loc["gpt-small"]
    assert (row.dataset, row.num_parameters, row.num_paths) == ("python-docs", 2_659_072, 2**24)
    assert row.test_bits_per_byte == pytest.approx(1.604, abs=5e-4)


def test_deleting_layers_of_the_shipped_network_is_what_hooks_do(shipped):
    model, inputs, targets = shipped
    layers = rp.group_blocks(rp.unravel(model, inputs[:1]), "transformer_layer")
    assert len(layers) == 12
    plan = [rp.Lesion("delete", places) for places in ((0,), (5,), (3, 4, 5, 6), (2, 7, 11))]
    frame = rp.lesion_study(layers, [(inputs, targets)], plan, progress=False)
    by_hooks = [loss_without(model, lesion.blocks, inputs, targets) for lesion in plan]
    assert frame.cross_entropy.tolist() == pytest.approx(by_hooks, rel=1e-12)
    assert frame.intact_cross_entropy.iloc[0] == pytest.approx(loss_without(model, [], inputs, targets), rel=1e-12)
    assert min(by_hooks) > frame.intact_cross_entropy.iloc[0]

"""Networks of torchvision and transformers, in tiny configurations: the sum is the output, in both linearisations."""

from __future__ import annotations

import pytest
import torch

import resnet_paths as rp


def image_model(name):
    torchvision = pytest.importorskip("torchvision").models
    if name == "resnet50":
        return torchvision.resnet50(num_classes=10)
    if name == "vit":
        return torchvision.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5)
    setting = torchvision.convnext.CNBlockConfig
    return torchvision.ConvNeXt([setting(8, 16, 2), setting(16, None, 2)], num_classes=5)


def language_model(name):
    transformers = pytest.importorskip("transformers")
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "convnext", "vit", "gpt2", "llama"])
def test_contributions_sum_to_the_output(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        of_images = name in ("resnet50", "convnext", "vit")
        model = (image_model if of_images else language_model)(name).double().eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases, scales of norms and of layers
                parameter.data += 0.1 * torch.randn_like(parameter)
        inputs = torch.randn(2, 3, 32, 32).double() if of_images else {"input_ids": torch.randint(0, 50, (2, 7))}
    chain = rp.unravel(model, inputs, verify=False)
    output = "margin" if of_images else lambda logits: logits[:, -1, 3]
    with torch.no_grad():
        returned = chain(inputs) if of_images else chain(**inputs)
    two = returned.topk(2, -1).values if of_images else None
    expected = two[:, 0] - two[:, 1] if of_images else returned[:, -1, 3]
    for linearization in ("tangent", "detached"):
        frame = rp.prediction_by_path_length(chain, inputs, output=output, linearization=linearization)
        scale = frame.mean_absolute_contribution.sum()
        assert abs(frame.contribution.sum() - expected.mean().item()) <= 1e-12 * scale
        assert frame.attrs["residual"] <= 1e-12 * scale
        assert frame.attrs["tangent_operations"] == []


@pytest.mark.slow
def test_float32_suffices_for_a_resnet_of_110_layers():
    data = rp.load_dataset("fashion-mnist", split="test")
    images = torch.stack([data[index][0] for index in range(4)])
    chain = rp.unravel(rp.load_network("preact-resnet-110"), images, verify=False)
    frame = rp.prediction_by_path_length(chain, images)
    assert frame.attrs["residual"] < 1e-3 * frame.attrs["mean_output"]
    with torch.no_grad():
        two = chain(images).topk(2).values
    assert frame.contribution.sum() == pytest.approx((two[:, 0] - two[:, 1]).mean().item(), rel=1e-3)

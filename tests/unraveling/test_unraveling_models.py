"""Deleting a block of a model that people use equals zeroing what its branch adds, by hand, with hooks of plain torch.

Small networks of torchvision, transformers and the zoo, made by their own classes with random weights. Each is given
with the module of its own whose output is what the branch adds, so that its structure is stated beside the chain's.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torchvision.models import convnext, densenet, efficientnet, regnet, swin_transformer, vision_transformer

import resnet_paths as rp
from resnet_paths.zoo.senet import SEResNet

MB = functools.partial(efficientnet.MBConvConfig, kernel=3, width_mult=1, depth_mult=1)


def vit():
    """Attention returns a pair; what is added comes out of the dropout after it."""
    model = vision_transformer.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=4)
    added = {}
    for layer in ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"):
        added |= {f"{layer}.self_attention": f"{layer}.dropout", f"{layer}.mlp": f"{layer}.mlp"}
    return model, images(16), added


def convnext_of_two_stages():
    """A layer scale and stochastic depth stand between what the hook zeroes and the addition."""
    stages = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 2)]
    model = convnext.ConvNeXt(stages, stochastic_depth_prob=0.1, num_classes=4)
    return model, images(16), {name: f"{name}.block" for name in ("features.1.0", "features.3.0", "features.3.1")}


def swin():
    """The second layer of the first stage shifts its windows; between both stages patches are merged."""
    model = swin_transformer.SwinTransformer(
        [4, 4], 8, [2, 1], [2, 2], [2, 2], stochastic_depth_prob=0.1, num_classes=4
    )
    layers = ("features.1.0", "features.1.1", "features.3.0")
    blocks = [f"{layer}.{block}" for layer in layers for block in ("attn", "mlp")]
    return model, images(32), dict(zip(blocks, blocks, strict=True))


def efficientnet_of_two_stages():
    """The first layer of the second stage has no skip, and is no block."""
    stages = [
        MB(expand_ratio=1, stride=1, input_channels=8, out_channels=8, num_layers=2),
        MB(expand_ratio=4, stride=2, input_channels=8, out_channels=16, num_layers=2),
    ]
    model = efficientnet.EfficientNet(stages, dropout=0.2, num_classes=4)
    return model, images(16), {name: f"{name}.block" for name in ("features.1.0", "features.1.1", "features.2.1")}


def regnet_with_squeeze_and_excitation():
    """The first block of each stage has a projection, which stays."""
    stages = regnet.BlockParams([1, 2], [8, 16], [4, 8], [1, 1], [2, 2], se_ratio=0.25)
    names = [f"trunk_output.block{stage}.block{stage}-{i}" for stage, i in ((1, 0), (2, 0), (2, 1))]
    return regnet.RegNet(stages, num_classes=4, stem_width=8), images(16), {name: f"{name}.f" for name in names}


def se_resnet():
    names = [f"layer{stage}.0" for stage in (1, 2, 3)]
    return SEResNet(8, in_channels=3), images(8), {name: f"{name}.gate" for name in names}


def timm_resnet():
    """Post-activation, with squeeze and excitation in the branch and an addition in place."""
    resnet = pytest.importorskip("timm.models.resnet")
    sizes = {"stem_width": 8, "channels": (8, 8, 16, 16), "num_classes": 4}
    model = resnet.ResNet(resnet.BasicBlock, (1, 1, 2, 1), block_args={"attn_layer": "se"}, **sizes)
    names = ["layer1.0", "layer2.0", "layer3.0", "layer3.1", "layer4.0"]
    return model, images(32), {name: f"{name}.se" for name in names}


def densenet_of_two_blocks():
    """What is zeroed are the new features of a layer, in the input of every later one."""
    names = [f"features.denseblock{block}.denselayer{layer}" for block in (1, 2) for layer in (1, 2)]
    return densenet.DenseNet(4, (2, 2), 8, 2, num_classes=4), images(32), dict(zip(names, names, strict=True))


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def bert():
    """Post-norm: what follows each addition stays."""
    hf = pytest.importorskip("transformers")
    model = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=2, num_labels=4, **SMALL))
    blocks = [f"bert.encoder.layer.{i}.{block}" for i in range(2) for block in ("attention.output", "output")]
    return model, tokens(), {block: f"{block}.dense" for block in blocks}


def gpt2():
    hf = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(use_cache=False, **sizes))
    blocks = [f"transformer.h.{i}.{block}" for i in range(2) for block in ("attn", "mlp")]
    return model, tokens(), dict(zip(blocks, blocks, strict=True))


def llama():
    """Two heads share one key and value; positions are rotated into both."""
    hf = pytest.importorskip("transformers")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, use_cache=False, **SMALL))
    blocks = [f"model.layers.{i}.{block}" for i in range(2) for block in ("self_attn", "mlp")]
    return model, tokens(), dict(zip(blocks, blocks, strict=True))


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens():
    return torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))


def zeros(module, inputs, output):
    """In a hook: zeros in place of what a module returns, or of the first thing."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def answer(model, x):
    returned = model(x)
    return returned if isinstance(returned, torch.Tensor) else returned.logits


@pytest.mark.parametrize(
    "make",
    [
        vit,
        bert,
        gpt2,
        llama,
        convnext_of_two_stages,
        swin,
        efficientnet_of_two_stages,
        regnet_with_squeeze_and_excitation,
        se_resnet,
        timm_resnet,
        densenet_of_two_blocks,
    ],
)
def test_deleting_a_block_by_name_equals_zeroing_its_branch_by_hand(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, added = make()
        for parameter in model.parameters():  # a fresh branch adds too little to be seen: ConvNeXt's, scaled by 1e-6
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    model.eval()
    chain = rp.unravel(model, x)
    assert [block.name for block in chain] == list(added)
    with torch.no_grad():
        intact = answer(model, x)
        for block, module in added.items():
            hook = model.get_submodule(module).register_forward_hook(zeros)
            by_hand = answer(model, x)
            hook.remove()
            torch.testing.assert_close(rp.delete_block(chain, block)(x), by_hand)
            assert not torch.allclose(by_hand, intact, rtol=1e-2)

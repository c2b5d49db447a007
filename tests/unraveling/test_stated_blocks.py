"""The blocks that ``tests/benchmarks/architectures.py`` states, counted a second way: from the libraries' own modules.

Nothing here calls ``unravel``. `ADDITIONS` says how often each class of module adds (or concatenates) a branch in its
own ``forward``, as its source reads; a network's blocks are the sum over its modules. Stated counts come from papers
and configurations, these from what the libraries build: where both agree, neither was copied from the chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.benchmarks.architectures import (
    TABLE,
    TIMM,
    TORCHVISION,
    timm_model,
    torchvision_model,
    transformers_models,
)
from tests.benchmarks.plain_checks import TOLERANCE

ALWAYS = {
    "torchvision": {
        1: """resnet.BasicBlock resnet.Bottleneck regnet.ResBottleneckBlock densenet._DenseLayer convnext.CNBlock
            maxvit.MBConv squeezenet.Fire googlenet.Inception shufflenetv2.InvertedResidual inception.InceptionA
            inception.InceptionB inception.InceptionC inception.InceptionD inception.InceptionE""",
        2: """swin_transformer.SwinTransformerBlock swin_transformer.SwinTransformerBlockV2
            vision_transformer.EncoderBlock maxvit.PartitionAttentionLayer""",
    },
    "timm": {
        1: """resnet.Bottleneck resnetv2.PreActBottleneck resnest.ResNestBottleneck
            res2net.Bottle2neck sknet.SelectiveKernelBasic senet.SEBottleneck nfnet.NormFreeBlock cspnet.DarkBlock
            dpn.DualPathBlock vovnet.OsaBlock byobnet.RepVggBlock convmixer.Residual convnext.ConvNeXtBlock
            inception_next.MetaNeXtBlock mambaout.GatedConvBlock starnet.Block mlp_mixer.SpatialGatingBlock
            inception_resnet_v2.Block35 inception_resnet_v2.Block17 inception_resnet_v2.Block8
            inception_resnet_v2.Mixed_5b inception_resnet_v2.Mixed_6a inception_resnet_v2.Mixed_7a
            edgenext.ConvBlock edgenext.SplitTransposeBlock mobilevit.MobileVitBlock maxxvit.MbConvBlock
            tiny_vit.MBConv gcvit.MbConvBlock davit.ConvPosEnc levit.LevitDownsample
            repvit.RepVggDw repvit.RepViTBlock repvit.RepVitDownsample fastvit.RepMixer fastvit.RepMixerBlock
            levit.LevitDistilled efficientformer.EfficientFormer""",
        2: """vision_transformer.Block vision_transformer_relpos.RelPosBlock eva.EvaBlock beit.Block
            cait.LayerScaleBlock cait.LayerScaleBlockClassAttn volo.Outlooker volo.Transformer volo.ClassBlock
            xcit.ClassAttentionBlock mlp_mixer.MixerBlock mlp_mixer.ResBlock metaformer.MetaFormerBlock
            mobilevit.LinearTransformerBlock swin_transformer_v2_cr.SwinTransformerV2CrBlock davit.SpatialBlock
            davit.ChannelBlock efficientformer.MetaBlock2d efficientformer.MetaBlock1d focalnet.FocalNetBlock
            hiera.HieraBlock sequencer.Sequencer2dBlock pvt_v2.Block maxxvit.TransformerBlock2d
            tiny_vit.TinyVitBlock nest.TransformerLayer gcvit.GlobalContextVitBlock levit.LevitBlock twins.Block""",
        3: "xcit.XCABlock coat.SerialBlock",
    },
    "transformers": {
        1: """modeling_gptj.GPTJBlock modeling_phi.PhiDecoderLayer modeling_resnet.ResNetBottleNeckLayer
            modeling_convnext.ConvNextLayer modeling_t5.T5LayerSelfAttention modeling_t5.T5LayerFF
            modeling_wav2vec2.Wav2Vec2Encoder""",
        2: """modeling_bert.BertLayer modeling_roberta.RobertaLayer modeling_electra.ElectraLayer
            modeling_distilbert.TransformerBlock modeling_mpnet.MPNetLayer modeling_gpt2.GPT2Block
            modeling_gpt_neo.GPTNeoBlock modeling_opt.OPTDecoderLayer modeling_bloom.BloomBlock
            modeling_llama.LlamaDecoderLayer modeling_mistral.MistralDecoderLayer modeling_qwen2.Qwen2DecoderLayer
            modeling_gemma.GemmaDecoderLayer modeling_vit.ViTLayer modeling_deit.DeiTLayer modeling_beit.BeitLayer
            modeling_dinov2.Dinov2Layer modeling_wav2vec2.Wav2Vec2EncoderLayer""",
    },
}
"""Classes whose ``forward`` adds or concatenates so often, whatever their arguments. Attention and MLP of one layer in
parallel (GPT-J, Phi) are one addition of three summands."""

WHERE: dict[str, Callable[[Any], bool | int]] = {
    **dict.fromkeys(
        (
            "torchvision.mobilenetv2.InvertedResidual",
            "torchvision.mobilenetv3.InvertedResidual",
            "torchvision.efficientnet.MBConv",
            "torchvision.efficientnet.FusedMBConv",
        ),
        lambda m: m.use_res_connect,
    ),
    "torchvision.mnasnet._InvertedResidual": lambda m: m.apply_residual,
    **dict.fromkeys(
        (
            "timm._efficientnet_blocks." + name
            for name in (
                "ConvBnAct",
                "DepthwiseSeparableConv",
                "InvertedResidual",
                "EdgeResidual",
                "UniversalInvertedResidual",
            )
        ),
        lambda m: m.has_skip,
    ),
    **dict.fromkeys(
        ("timm.byobnet.BasicBlock", "timm.byobnet.BottleneckBlock", "timm.efficientvit_mit.ResidualBlock"),
        lambda m: m.shortcut is not None,
    ),
    "timm.rexnet.LinearBottleneck": lambda m: m.use_shortcut,
    "timm.xception_aligned.XceptionModule": lambda m: not m.no_skip,
    "timm.visformer.Block": lambda m: 1 + (m.attn is not None),
    "timm.twins.PosConv": lambda m: m.stride == 1,
    "timm.fastvit.MobileOneBlock": lambda m: (
        (m.identity is not None) + (m.conv_scale is not None) + len(m.conv_kxk or ()) > 1
    ),
    "timm.fastvit.ReparamLargeKernelConv": lambda m: m.small_conv is not None,
    "timm.repvit.RepVitClassifier": lambda m: m.distillation,
    "timm.volo.VOLO": lambda m: m.aux_head is not None,
    "transformers.modeling_gpt_neox.GPTNeoXLayer": lambda m: 1 if m.use_parallel_residual else 2,
    # One layer for all: it is called again and again.
    "transformers.modeling_albert.AlbertTransformer": lambda m: 2 * m.config.num_hidden_layers,
}
"""Classes that add where an argument says so: in mobile networks where input and output have one shape."""

INSIDE_A_BRANCH = {
    "timm.mobilevit.MobileVitBlock",  # transformer layers inside what is concatenated with the block's input
    "timm.fastvit.RepMixer",  # its two convolutions are parallel maps themselves
    "timm.gcvit.FeatureBlock",  # makes the stage's global query, beside the trunk
}
"""Modules that are not entered: only the outermost blocks are stated."""

ADDITIONS: dict[str, Callable[[Any], bool | int]] = WHERE | {
    f"{library}.{name}": lambda _, number=number: number
    for library, numbers in ALWAYS.items()
    for number, names in numbers.items()
    for name in names.split()
}


def additions(module: nn.Module) -> int:
    """Residual additions and concatenations of a network's outermost blocks, by the source of its modules."""
    package = type(module).__module__.split(".")
    name = f"{package[0]}.{package[-1]}.{type(module).__name__}"
    own = int(ADDITIONS[name](module)) if name in ADDITIONS else 0
    return own + (0 if name in INSIDE_A_BRANCH else sum(map(additions, module.children())))


def plain_blocks(model: nn.Module) -> int:
    """Blocks of a net without skips: its modules with several layers, or its weight layers but the first and last."""
    modules = [m for m in model.modules() if type(m).__name__ == "DepthwiseSeparableConv"]
    return len(modules) or sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) - 2


class NoWeights(TorchFunctionMode):
    """Modules are built with weights that have a shape and no values, which takes neither memory nor time."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.empty:
            return function(*args, **((kwargs or {}) | {"device": "meta"}))
        tensor = args[0] if args else (kwargs or {}).get("tensor")  # as torch.nn.init calls its first argument
        is_in_place = function.__name__.endswith("_") and not function.__name__.endswith("__")
        if is_in_place and tensor is not None and tensor.is_meta:
            return tensor
        return function(*args, **(kwargs or {}))


def different(made: Callable[[str], nn.Module], stated: dict[str, int | None]) -> dict[str, tuple[int, int]]:
    """Networks whose modules give another number than is stated: (stated, counted)."""
    counts = {}
    for name, number in stated.items():
        if number is not None:
            with NoWeights():
                model = made(name)
            counts[name] = (number, additions(model) or plain_blocks(model))
    return {name: pair for name, pair in counts.items() if pair[0] != pair[1]}


def test_torchvision():
    assert different(lambda name: torchvision_model(name)[0], TORCHVISION) == {}


def test_timm():
    pytest.importorskip("timm")
    assert different(lambda name: timm_model(name)[0], TIMM) == {}


def test_transformers():
    pytest.importorskip("transformers")
    models = transformers_models()
    assert different(lambda name: models[name][0](), {name: stated for name, (_, _, stated) in models.items()}) == {}


def test_the_table_shows_what_is_stated():
    table = pd.read_csv(TABLE, index_col=["library", "architecture"]).blocks_stated
    for library, stated in (("torchvision", TORCHVISION), ("timm", TIMM)):
        written = table[library].astype(object).where(table[library].notna(), None)
        assert written.to_dict() == stated


def test_deletions_and_gradients_in_the_table_are_right():
    checked = pd.read_csv(TABLE).dropna(subset=["deletions_checked"])
    assert (checked.deletions_right == checked.deletions_checked).all()
    assert (checked.gradient_difference <= TOLERANCE).all()

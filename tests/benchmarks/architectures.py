"""What can be unraveled: ``python -m tests.benchmarks.architectures`` writes ``data/architectures.csv``.

Networks of torchvision, timm and transformers, as they are, with random weights: blocks found beside the number that
the architecture's paper or configuration states, paths, kinds of skip, the largest difference between chain and model,
the CPU seconds of one core that unraveling takes, three deletions and the gradient at the input (or at the parameters)
against plain PyTorch (`tests.benchmarks.plain_checks`). A failure or a refusal stands in the table with its reason.

Needs ``pip install timm transformers``. Every row is written as soon as it is made: ``--only NAME ...`` runs these
networks alone and keeps the other rows, ``--resume`` runs those that have no row in the output yet.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths._utils.files import write_then_rename
from tests.benchmarks.plain_checks import TOLERANCE, chosen, deletions, gradient_difference, spread

TABLE = Path(__file__).parents[2] / "data" / "architectures.csv"
COUNTS = ["blocks", "blocks_stated", "deletions_right", "deletions_checked"]
COLUMNS = [
    *("library", "architecture", "blocks", "blocks_stated", "paths", "skips", "max_difference"),
    *("deletions_right", "deletions_checked", "gradient_difference", "seconds", "reason"),
]


def compound(depth: float) -> int:
    """Blocks stated of EfficientNet: a stage of r layers is scaled to ceil(depth * r); its first layer has no skip."""
    return sum(math.ceil(depth * repeats) - 1 for repeats in (1, 2, 2, 3, 3, 4, 1))


# What is stated: how often the outermost blocks add (or concatenate) a branch, a number for each stage. The comment
# over each group names where it can be read: the paper, then the argument or table in the library's source.
# tests/unraveling/test_stated_blocks.py counts all of them again from the modules that the libraries build.
TORCHVISION = {
    # He et al. 2015, table 1; Xie et al. 2017, table 1; Zagoruyko and Komodakis 2016. `layers=` of each network.
    "resnet18": 2 + 2 + 2 + 2,
    "resnet34": 3 + 4 + 6 + 3,
    "resnet50": 3 + 4 + 6 + 3,
    "resnet101": 3 + 4 + 23 + 3,
    "resnet152": 3 + 8 + 36 + 3,
    "resnext50_32x4d": 3 + 4 + 6 + 3,
    "resnext101_32x8d": 3 + 4 + 23 + 3,
    "resnext101_64x4d": 3 + 4 + 23 + 3,
    "wide_resnet50_2": 3 + 4 + 6 + 3,
    "wide_resnet101_2": 3 + 4 + 23 + 3,
    # Radosavovic et al. 2020. The sum is `depth=`; its stages are `BlockParams.from_init_params(...).depths`.
    "regnet_x_400mf": 1 + 2 + 7 + 12,
    "regnet_x_800mf": 1 + 3 + 7 + 5,
    "regnet_x_1_6gf": 2 + 4 + 10 + 2,
    "regnet_x_3_2gf": 2 + 6 + 15 + 2,
    "regnet_x_8gf": 2 + 5 + 15 + 1,
    "regnet_x_16gf": 2 + 6 + 13 + 1,
    "regnet_x_32gf": 2 + 7 + 13 + 1,
    "regnet_y_400mf": 1 + 3 + 6 + 6,
    "regnet_y_800mf": 1 + 3 + 8 + 2,
    "regnet_y_1_6gf": 2 + 6 + 17 + 2,
    "regnet_y_3_2gf": 2 + 5 + 13 + 1,
    "regnet_y_8gf": 2 + 4 + 10 + 1,
    "regnet_y_16gf": 2 + 4 + 11 + 1,
    "regnet_y_32gf": 2 + 5 + 12 + 1,
    "regnet_y_128gf": 2 + 7 + 17 + 1,
    # Huang et al. 2017, table 1: dense layers, each of which concatenates. The second argument of `_densenet`.
    "densenet121": 6 + 12 + 24 + 16,
    "densenet161": 6 + 12 + 36 + 24,
    "densenet169": 6 + 12 + 32 + 32,
    "densenet201": 6 + 12 + 48 + 32,
    # Layers of stride 1 with as many channels out as in; the first of most stages has no skip. Sandler et al. 2018,
    # table 2, `inverted_residual_setting`; Howard et al. 2019, tables 2 and 1, a number for each width,
    # `_mobilenet_v3_conf`; Tan et al. 2019, the repeats given to `_stack`.
    "mobilenet_v2": 0 + 1 + 2 + 3 + 2 + 2 + 0,
    "mobilenet_v3_small": 0 + 1 + 2 + 1 + 2,
    "mobilenet_v3_large": 1 + 1 + 2 + 3 + 1 + 2,
    **dict.fromkeys(("mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"), 2 + 2 + 2 + 1 + 3 + 0),
    # The same. Tan and Le 2019, table 1 for B0, `depth_mult=`; Tan and Le 2021, table 4 for S, `_efficientnet_conf`:
    # a stage's layers less one, but for the first stage.
    "efficientnet_b0": compound(1.0),
    "efficientnet_b1": compound(1.1),
    "efficientnet_b2": compound(1.2),
    "efficientnet_b3": compound(1.4),
    "efficientnet_b4": compound(1.8),
    "efficientnet_b5": compound(2.2),
    "efficientnet_b6": compound(2.6),
    "efficientnet_b7": compound(3.1),
    "efficientnet_v2_s": 2 + 3 + 3 + 5 + 8 + 14,
    "efficientnet_v2_m": 3 + 4 + 4 + 6 + 13 + 17 + 4,
    "efficientnet_v2_l": 4 + 6 + 6 + 9 + 18 + 24 + 6,
    # Liu et al. 2022, `block_setting`.
    "convnext_tiny": 3 + 3 + 9 + 3,
    **dict.fromkeys(("convnext_small", "convnext_base", "convnext_large"), 3 + 3 + 27 + 3),
    # Attention and MLP in each layer. Liu et al. 2021, `depths=`; Dosovitskiy et al. 2021, table 1, `num_layers=`.
    "swin_t": 2 * (2 + 2 + 6 + 2),
    "swin_s": 2 * (2 + 2 + 18 + 2),
    "swin_b": 2 * (2 + 2 + 18 + 2),
    "swin_v2_t": 2 * (2 + 2 + 6 + 2),
    "swin_v2_s": 2 * (2 + 2 + 18 + 2),
    "swin_v2_b": 2 * (2 + 2 + 18 + 2),
    "vit_b_16": 2 * 12,
    "vit_b_32": 2 * 12,
    "vit_l_16": 2 * 24,
    "vit_l_32": 2 * 24,
    "vit_h_14": 2 * 32,
    # Tu et al. 2022, `block_layers=`: an MBConv, then attention and MLP on windows and again on the grid.
    "maxvit_t": 5 * (2 + 2 + 5 + 2),
    # Nets without skips, where "block" is our word: the weight layers of Simonyan and Zisserman 2015, table 1, and of
    # Krizhevsky et al. 2012, less the first and the last, which are stem and head.
    **{f"vgg{layers}{norm}": layers - 2 for layers in (11, 13, 16, 19) for norm in ("", "_bn")},
    "alexnet": 8 - 2,
    # Modules that concatenate. Iandola et al. 2016, table 1, fire2 to fire9; Szegedy et al. 2015, table 1, inception 3a
    # to 5b; torchvision's Inception3, classes A to E; Ma et al. 2018, table 5, `stages_repeats`.
    "squeezenet1_0": 8,
    "squeezenet1_1": 8,
    "googlenet": 2 + 5 + 2,
    "inception_v3": 3 + 1 + 4 + 1 + 2,
    **{f"shufflenet_v2_x{width}": 4 + 8 + 4 for width in ("0_5", "1_0", "1_5", "2_0")},
}
"""Blocks stated, of every classification network of torchvision."""

TIMM = {
    # Residual networks: `layers=` or `depths=`; in byobnet, nfnet and cspnet the table of configurations, d= or depth=.
    "resnet26d": 2 + 2 + 2 + 2,
    "resnetv2_50": 3 + 4 + 6 + 3,
    "resnet50_gn": 3 + 4 + 6 + 3,
    "nf_resnet50": 3 + 4 + 6 + 3,
    "seresnet33ts": 2 + 3 + 3 + 2,
    "ecaresnet26t": 2 + 2 + 2 + 2,
    "resnest14d": 1 + 1 + 1 + 1,
    "res2net50_26w_4s": 3 + 4 + 6 + 3,
    "skresnet18": 2 + 2 + 2 + 2,
    "seresnext26d_32x4d": 2 + 2 + 2 + 2,
    "darknet53": 1 + 2 + 8 + 8 + 4,
    "gernet_s": 1 + 3 + 7 + 2 + 1,
    "dm_nfnet_f0": 1 + 2 + 6 + 3,
    "nfnet_l0": 1 + 2 + 6 + 3,
    "legacy_senet154": 3 + 8 + 36 + 3,
    "regnetz_b16": 1 + 5 + 11 + 1,  # d=2, 6, 12, 2; `downsample=''`: no skip where the shape changes
    "xception41": 3 + 8 + 1 + 0,  # `block_cfg`: entry, middle and exit flow; the last has `no_skip=True`
    # Layers that keep the shape: `arch_def`, r= repeats, s= stride, c= channels; the stem gives 16 or 32.
    "efficientnet_lite0": compound(1.0),
    "tf_efficientnetv2_b0": 0 + 1 + 1 + 2 + 4 + 7,
    "mixnet_s": 1 + 1 + 3 + 2 + 2 + 2,
    "mobilenetv3_large_100": 1 + 1 + 2 + 3 + 1 + 2,
    "fbnetc_100": 1 + 2 + 3 + 3 + 3 + 3 + 0,
    "hardcorenas_a": 0 + 1 + 1 + 1 + 1 + 1,
    "tinynet_a": 0 + 1 + 1 + 3 + 3 + 4 + 0,  # repeats scaled by 1.2 and rounded: 1, 2, 2, 4, 4, 5, 1
    "mobilenetv4_conv_small": 0 + 0 + (4 + 1) + (1 + 1 + 1 + 2),
    "rexnet_100": 0 + 1 + 1 + 2 + 3 + 4,  # `_block_cfg`: 1, 2, 2, 3, 3, 5 layers; a skip into more channels counts
    "lcnet_050": 1 + 2 + 2 + 2 + 4 + 2,  # dsa_: depthwise separable without skips, a plain net of 13 modules
    # Ding et al. 2021: each block sums two or three parallel maps; the first is the stem.
    "repvgg_a0": 1 + 2 + 4 + 14 + 1,
    # Modules that concatenate: `block_per_stage`; k_sec of DPN.
    "ese_vovnet19b_dw": 1 + 1 + 1 + 1,
    "dpn68": 3 + 4 + 12 + 3,
    # The three that concatenate, then `repeat`, `repeat_1`, `repeat_2` and block8; the paper has 5, 10 and 5.
    "inception_resnet_v2": 3 + 10 + 20 + (9 + 1),
    # Networks of branches that cross: neither paper nor configuration gives a number of additions in a row.
    "dla34": None,
    "crossvit_tiny_240": None,
    "hrnet_w18_small": None,
    # Attention and MLP in each layer: `depth=` or `depths=`.
    "deit_tiny_patch16_224": 2 * 12,
    "deit3_small_patch16_224": 2 * 12,
    "vit_tiny_patch16_224": 2 * 12,
    "vit_relpos_small_patch16_224": 2 * 12,
    "vit_small_patch16_rope_224": 2 * 12,
    "beit_base_patch16_224": 2 * 12,
    "eva02_tiny_patch14_224": 2 * 12,
    "pit_ti_224": 2 * (2 + 6 + 4),
    "swinv2_cr_tiny_224": 2 * (2 + 2 + 6 + 2),
    "hiera_tiny_224": 2 * (1 + 2 + 7 + 2),
    "pvt_v2_b0": 2 * (2 + 2 + 2 + 2),
    "nest_tiny": 2 * (2 + 2 + 8),
    "focalnet_tiny_srf": 2 * (2 + 2 + 6 + 2),
    # Token mixing and MLP in each: `num_blocks=`, `depths=`, `layers=`. gMLP has one addition a block, ConvMixer one
    # around each depthwise convolution.
    "mixer_s16_224": 2 * 8,
    "resmlp_12_224": 2 * 12,
    "gmlp_s16_224": 30,
    "convmixer_768_32": 32,
    "poolformer_s12": 2 * (2 + 2 + 6 + 2),
    "caformer_s18": 2 * (3 + 3 + 9 + 3),
    "convformer_s18": 2 * (3 + 3 + 9 + 3),
    "sequencer2d_s": 2 * (4 + 3 + 8 + 3),
    # One addition in each block: `depths=`.
    "convnextv2_atto": 2 + 2 + 6 + 2,
    "convnext_femto": 2 + 2 + 6 + 2,
    "inception_next_tiny": 3 + 3 + 9 + 3,
    "edgenext_xx_small": 2 + 2 + 6 + 2,
    "mambaout_femto": 3 + 3 + 9 + 3,
    "starnet_s1": 2 + 2 + 8 + 3,
    # Class attention has two additions a layer as well: `depth_token_only=2`, `cls_attn_layers=2`, `post_layers=`. In
    # CaiT and VOLO they are on the class token alone: unravel finds CaiT's four inside one block, VOLO's inside two.
    "cait_xxs24_224": 2 * 24 + 2 * 2,
    "xcit_nano_12_p16_224": 3 * 12 + 2 * 2,  # XCiT: local patch interaction too
    "volo_d1_224": 2 * (4 + 4 + 8 + 2) + 2 * 2 + 1,  # the classes of all patches are added to those of the token
    # `depths=`, and positional convolutions with a skip: one a stage in Twins, one a block in CoaT, two a block in
    # DaViT, which has a spatial and a channel block for each unit of depth.
    "twins_svt_small": 2 * (2 + 2 + 10 + 4) + 4,
    "davit_tiny": 2 * (2 + 2) * (1 + 1 + 3 + 1),
    "coat_lite_tiny": 3 * (2 + 2 + 2 + 2),
    # Convolution first, attention later. `depth=`, with `attn_stage='011'`; `depths=` with MBConvs in the first stages.
    "visformer_tiny": 7 + 2 * 4 + 2 * 4,
    "tiny_vit_5m_224": 2 + 2 * (2 + 6 + 2),
    "coatnet_nano_rw_224": 3 + 4 + 2 * 6 + 2 * 3,
    "efficientvit_b0": 1 + 1 + 1 + 2 * (2 + 2),  # `depths=`; the strided first of a stage has no skip
    # Inverted residuals that keep the shape, then `transformer_depth=` 2, 4 and 3: in MobileViT inside a block that
    # concatenates their output with its input, in the second version layers in a row.
    "mobilevit_xxs": 1 + 2 + 1 + 1 + 1,
    "mobilevitv2_050": 0 + 1 + 2 * (2 + 4 + 3),
    # `depths=`, a residual MBConv in the stem and in three downsamplings (those of the global query lie beside).
    "gcvit_xxtiny": 2 * (2 + 2 + 6 + 2) + 4,
    # `depth=`, and the mean of two heads. LeViT: an MLP in each of two downsamplings; RepViT: three additions in each
    # of three.
    "efficientformer_l1": 2 * (3 + 2 + 6 + 4) + 1,
    "levit_128s": 2 * (2 + 3 + 4) + 2 + 1,
    "repvit_m0_9": 2 * (2 + 2 + 14 + 2) + 3 * 3 + 1,
    # `layers=`; parallel maps: three in the stem, two in each of three downsamplings, the last convolution.
    "fastvit_t8": 2 * (2 + 2 + 4 + 2) + 3 + 2 * 3 + 1,
}
"""Blocks stated of networks of timm; None where no number is documented."""


def transformers_models() -> dict[str, tuple[Callable[[], nn.Module], Any, int]]:
    """Name: (maker of a tiny model, example, blocks stated).

    Stated are two additions for each of the configuration's layers, one where attention and MLP are parallel (GPT-J,
    GPT-NeoX with `use_parallel_residual`, Phi), the sum of `depths` for convolutional networks, and the convolution of
    positions in front of wav2vec2's layers.
    """
    import transformers as hf

    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    words = {"vocab_size": 99, "max_position_embeddings": 64}
    tokens = torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sound = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    gpt = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 99}
    llama = small | words | {"num_key_value_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8}

    def made(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(hf, model)(getattr(hf, config)(**settings))

    return {
        "bert": (made("BertForMaskedLM", "BertConfig", **small, **words), tokens, 2 * 3),
        "roberta": (made("RobertaModel", "RobertaConfig", **small, **words), tokens, 2 * 3),
        "electra": (made("ElectraModel", "ElectraConfig", embedding_size=32, **small, **words), tokens, 2 * 3),
        "distilbert": (
            made("DistilBertModel", "DistilBertConfig", dim=32, n_layers=3, n_heads=4, hidden_dim=64, vocab_size=99),
            tokens,
            2 * 3,
        ),
        "albert": (made("AlbertModel", "AlbertConfig", embedding_size=16, **small, **words), tokens, 2 * 3),
        "mpnet": (made("MPNetModel", "MPNetConfig", **small, **words), tokens, 2 * 3),
        "gpt2": (made("GPT2LMHeadModel", "GPT2Config", use_cache=False, **gpt), tokens, 2 * 3),
        "gptj": (made("GPTJModel", "GPTJConfig", use_cache=False, rotary_dim=4, **gpt), tokens, 3),
        "gpt_neo": (
            made(
                "GPTNeoModel",
                "GPTNeoConfig",
                hidden_size=32,
                num_layers=4,
                num_heads=4,
                vocab_size=99,
                use_cache=False,
                attention_types=[[["global", "local"], 2]],
                max_position_embeddings=64,
            ),
            tokens,
            2 * 4,
        ),
        "gpt_neox": (made("GPTNeoXModel", "GPTNeoXConfig", use_cache=False, **small, **words), tokens, 3),
        "opt": (
            made(
                "OPTModel",
                "OPTConfig",
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                ffn_dim=64,
                word_embed_proj_dim=32,
                use_cache=False,
                **words,
            ),
            tokens,
            2 * 3,
        ),
        "bloom": (
            made("BloomModel", "BloomConfig", hidden_size=32, n_layer=3, n_head=4, vocab_size=99, use_cache=False),
            tokens,
            2 * 3,
        ),
        "llama": (made("LlamaForCausalLM", "LlamaConfig", use_cache=False, **llama), tokens, 2 * 3),
        "mistral": (made("MistralModel", "MistralConfig", use_cache=False, **llama), tokens, 2 * 3),
        "qwen2": (made("Qwen2Model", "Qwen2Config", use_cache=False, **llama), tokens, 2 * 3),
        "gemma": (made("GemmaModel", "GemmaConfig", use_cache=False, head_dim=8, **llama), tokens, 2 * 3),
        "phi": (made("PhiModel", "PhiConfig", use_cache=False, **small, **words), tokens, 3),
        "t5_encoder": (
            made("T5EncoderModel", "T5Config", d_model=32, num_layers=3, num_heads=4, d_kv=8, d_ff=64, vocab_size=99),
            tokens,
            2 * 3,
        ),
        "vit": (made("ViTForImageClassification", "ViTConfig", **vision), images, 2 * 3),
        "deit": (made("DeiTModel", "DeiTConfig", **vision), images, 2 * 3),
        "beit": (made("BeitModel", "BeitConfig", **vision), images, 2 * 3),
        "dinov2": (
            made("Dinov2Model", "Dinov2Config", **{k: v for k, v in vision.items() if k != "intermediate_size"}),
            images,
            2 * 3,
        ),
        "resnet": (
            made("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2]),
            images,
            2 + 2,
        ),
        "convnext": (
            made("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2),
            images,
            2 + 2,
        ),
        "wav2vec2": (
            made(
                "Wav2Vec2Model",
                "Wav2Vec2Config",
                conv_dim=(8, 8),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2,
                **small,
            ),
            sound,
            1 + 2 * 3,
        ),
    }


def torchvision_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    size = 224 if name.startswith(("vit", "maxvit")) else 128
    return torchvision.models.get_model(name, weights=None, **options), torch.randn(2, 3, size, size)


def timm_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    import timm

    model = timm.create_model(name, pretrained=False)
    size = model.default_cfg["input_size"] if model.default_cfg.get("fixed_input_size") else (3, 128, 128)
    return model, torch.randn(2, *size)


def row_of(library: str, name: str, make: Callable[[], tuple[nn.Module, Any]], stated: int | None) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    own = re.compile(r'File ".*?(?:site-packages/)')  # where packages stand on this machine is nobody's business
    row: dict[str, Any] = {"library": library, "architecture": name, "blocks_stated": stated}
    model, example = make()
    model.eval()
    start = time.process_time()
    try:
        chain = rp.unravel(model, example)
    except rp.ResnetPathsError as error:
        return row | {
            "seconds": round(time.process_time() - start, 1),
            "reason": own.sub('File "', " ".join(str(error).split())),
        }
    row["seconds"] = round(time.process_time() - start, 1)
    with torch.no_grad():
        row["max_difference"] = float((chain(example) - chosen(model(example))).abs().max())
    spread(model)  # and with it the chain, which shares the parameters
    row["deletions_right"], row["deletions_checked"] = deletions(chain, model, example)
    row["gradient_difference"] = gradient_difference(chain, model, example)
    kinds = pd.Series([str(block.skip_kind or "none") for block in chain]).value_counts()
    return row | {
        "blocks": len(chain),
        "paths": str(chain.num_paths),
        "skips": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
    }


def summary(frame: pd.DataFrame) -> str:
    """The table in short, for the README and the documentation.

    Args:
        frame: The whole table.

    Returns:
        Markdown: counts by library, networks with other blocks than stated, deletions and gradients that agree with
        plain PyTorch, families of transformers, refusals with the place that makes them none.
    """
    lines = [
        "| library | networks | chain equals model exactly | blocks as stated | deletions right | gradient right "
        "| refused |"
    ]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for library, rows in frame.groupby("library", sort=False):
        stated = rows[rows.blocks_stated.notna() & rows.blocks.notna()].astype({"blocks": int, "blocks_stated": int})
        other = stated[stated.blocks != stated.blocks_stated]
        agreeing = [f"{len(stated) - len(other)} of {len(stated)}"]
        agreeing += [f"`{row.architecture}` {row.blocks} for {row.blocks_stated}" for row in other.itertuples()]
        reasons = rows.reason.fillna("").astype(str)
        places = reasons.str.extract(r"in ([^,(]+), File")[0].fillna("see the table").str.replace("\\'", "'")
        refused = [f"`{name}` ({place})" for name, place in zip(rows.architecture, places, strict=True)]
        refused = [text for text, reason in zip(refused, rows.reason.notna(), strict=True) if reason]
        lines.append(
            f"| {library} | {len(rows)} | {(rows.max_difference == 0).sum()} | "
            f"{', '.join(agreeing)} | {rows.deletions_right.sum():.0f} of {rows.deletions_checked.sum():.0f} "
            f"in {(rows.deletions_checked > 0).sum()} networks | "
            f"{(rows.gradient_difference <= TOLERANCE).sum()} of {rows.gradient_difference.notna().sum()} | "
            f"{', '.join(refused) or 'none'} |"
        )
    families = frame.architecture[frame.library == "transformers"]
    return "\n".join([*lines, "", f"Families of transformers, in tiny configurations: {', '.join(families)}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these networks; the others keep their rows")
    parser.add_argument("--resume", action="store_true", help="run the networks that have no row in the output yet")
    parser.add_argument("--output", type=Path, default=TABLE)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    work = [("torchvision", n, lambda n=n: torchvision_model(n), stated) for n, stated in TORCHVISION.items()]
    work += [("timm", n, lambda n=n: timm_model(n), stated) for n, stated in TIMM.items()]
    for name, (make, example, stated) in transformers_models().items():
        work.append(("transformers", name, lambda make=make, example=example: (make(), example), stated))
    order = {(library, name): i for i, (library, name, _, _) in enumerate(work)}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if (options.only or options.resume) and options.output.exists():
        rows = {(r["library"], r["architecture"]): r for r in pd.read_csv(options.output).to_dict("records")}
    for library, name, make, stated in work:
        if (library, name) in rows:
            rows[library, name]["blocks_stated"] = stated
        if (options.only and name not in options.only) or (options.resume and (library, name) in rows):
            continue
        rows[library, name] = row_of(library, name, make, stated)
        print(rows[library, name], flush=True)
        frame = pd.DataFrame(sorted(rows.values(), key=lambda r: order[r["library"], r["architecture"]]))
        with write_then_rename(options.output) as temporary:
            frame.reindex(columns=COLUMNS).astype(dict.fromkeys(COUNTS, "Int64")).to_csv(temporary, index=False)
    print(summary(pd.read_csv(options.output)))
    exact = sum(row.get("max_difference") == 0 for row in rows.values())
    agree = [row.get("blocks") == row["blocks_stated"] for row in rows.values() if row.get("blocks_stated") is not None]
    print(f"{exact} of {len(rows)} unravel with difference 0; blocks as stated in {sum(agree)} of {len(agree)}")


if __name__ == "__main__":
    main()

"""Networks by name, with a description and a training recipe of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from resnet_paths._utils.arguments import require_generator, require_int
from resnet_paths._utils.errors import ResnetPathsError, nearest_names
from resnet_paths.zoo.densenet import DenseNet
from resnet_paths.zoo.highway import HighwayNet
from resnet_paths.zoo.initialisation import initialise
from resnet_paths.zoo.language import GPT
from resnet_paths.zoo.random_depth import EffectiveResNet, StochasticDepthResNet
from resnet_paths.zoo.resnet import OptionAPreactResNet, PlainNet, PreactResNet, ResNet
from resnet_paths.zoo.senet import SEResNet
from resnet_paths.zoo.unet import UNet
from resnet_paths.zoo.vgg import VGG
from resnet_paths.zoo.vit import ViT

__all__ = ["NETWORKS", "NetworkFacts", "Recipe", "build_network", "check_num_drawn_blocks", "find_network"]


@dataclass(frozen=True)
class Recipe:
    """Default training settings of a network.

    Attributes:
        optimizer: ``"sgd"`` with Nesterov momentum, or ``"adamw"``.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay, as in `torch.optim`.
        max_gradient_norm: Norm of all gradients above which they are scaled down to it; None for no limit.
        batch_size: Images or sequences per mini-batch.
        dataset: Data set to train on.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    max_gradient_norm: float | None = None
    batch_size: int = 128
    dataset: str = "fashion-mnist"


@dataclass(frozen=True)
class NetworkFacts:
    """Description of a network.

    Attributes:
        build: Function of ``in_channels`` and ``num_classes`` that returns the module.
        description: Description in one line.
        num_blocks: Number of blocks found by `resnet_paths.unravel`.
        num_paths: Number of paths, 2^n with skips and 1 without.
        recipe: Default training settings.
        task: Training task, ``"classification"``, ``"denoising"`` or ``"language"``.
        draws_blocks: Whether each mini-batch trains a random subset of blocks, drawn by ``draw_blocks(generator)``.
        num_drawn_blocks: Minimum and maximum number of drawn blocks, if `build` takes it.
        num_classes: Number of logits by default.
    """

    build: Callable[..., nn.Module]
    description: str
    num_blocks: int
    num_paths: int
    recipe: Recipe = Recipe()
    task: str = "classification"
    draws_blocks: bool = False
    num_drawn_blocks: tuple[int, int] | None = None
    num_classes: int = 10


def _preact(depth: int, *, bottleneck: bool = False) -> NetworkFacts:
    layers = 3 if bottleneck else 2
    blocks = (depth - 2) // layers
    return NetworkFacts(
        partial(PreactResNet, depth, bottleneck=bottleneck),
        f"pre-activation ResNet, {blocks} blocks of {layers} convolutions",
        blocks,
        2**blocks,
    )


def _option_a(depth: int) -> NetworkFacts:
    blocks = (depth - 2) // 2
    return NetworkFacts(
        partial(OptionAPreactResNet, depth),
        f"pre-activation ResNet, {blocks} blocks of 2 convolutions, skips without parameters",
        blocks,
        2**blocks,
    )


def _resnet(depth: int) -> NetworkFacts:
    blocks = (depth - 2) // 2
    return NetworkFacts(
        partial(ResNet, depth), f"post-activation ResNet, {blocks} blocks of 2 convolutions", blocks, 2**blocks
    )


def _plain(depth: int) -> NetworkFacts:
    blocks = (depth - 2) // 2
    return NetworkFacts(partial(PlainNet, depth), f"plain net, {blocks} blocks of 2 convolutions, no skips", blocks, 1)


def _stochastic_depth(depth: int) -> NetworkFacts:
    blocks = (depth - 2) // 2
    return NetworkFacts(
        partial(StochasticDepthResNet, depth),
        f"pre-activation ResNet, {blocks} blocks that survive training by chance",
        blocks,
        2**blocks,
        draws_blocks=True,
    )


def _effective(depth: int) -> NetworkFacts:
    blocks = (depth - 2) // 2
    drawn = round(blocks * 23 / 54)  # the fraction of the paper
    return NetworkFacts(
        partial(EffectiveResNet, depth, num_drawn_blocks=(drawn, drawn)),
        f"pre-activation ResNet, {blocks} blocks of which each mini-batch trains {drawn}",
        blocks,
        2**blocks,
        draws_blocks=True,
        num_drawn_blocks=(drawn, drawn),
    )


NETWORKS: dict[str, NetworkFacts] = {
    **{f"preact-resnet-{depth}": _preact(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "preact-resnet-164": _preact(164, bottleneck=True),
    **{f"preact-resnet-{depth}-option-a": _option_a(depth) for depth in (20, 56, 110)},
    **{f"stochastic-depth-{depth}": _stochastic_depth(depth) for depth in (20, 56, 110)},
    **{f"effective-{depth}": _effective(depth) for depth in (20, 56, 110)},
    **{f"resnet-{depth}": _resnet(depth) for depth in (20, 32, 44, 56, 110)},
    **{f"plain-{depth}": _plain(depth) for depth in (20, 32, 44, 56, 110)},
    # Without BatchNorm, SGD diverges at a learning rate of 0.1, and at 0.02 the loss stays at chance for an epoch.
    "vgg-15": NetworkFacts(
        VGG, "VGG-like net, 14 blocks of 1 convolution, no skips, no BatchNorm", 14, 1, Recipe("adamw", 0.0005, 0.05)
    ),
    "se-resnet-20": NetworkFacts(
        partial(SEResNet, 20), "pre-activation ResNet, 9 blocks of 2 convolutions with squeeze and excitation", 9, 2**9
    ),
    "densenet-40": NetworkFacts(
        partial(DenseNet, growth=12), "DenseNet of growth 12, 36 blocks of 1 convolution", 36, 2**36
    ),
    "densenet-40-k8": NetworkFacts(
        partial(DenseNet, growth=8), "DenseNet of growth 8, 36 blocks of 1 convolution", 36, 2**36
    ),
    "highway-50": NetworkFacts(
        HighwayNet, "highway net, 48 blocks of 1 gated convolution, no BatchNorm", 48, 2**48, Recipe(learning_rate=0.05)
    ),
    "vit-small": NetworkFacts(
        ViT, "vision transformer, 24 blocks: attention and MLP of 12 layers", 24, 2**24, Recipe("adamw", 0.001, 0.05)
    ),
    "unet-small": NetworkFacts(
        UNet, "U-Net that takes noise away, 1 block with another in its branch", 1, 3, task="denoising"
    ),
    "gpt-small": NetworkFacts(
        GPT,
        "language model like GPT-2, 24 blocks: attention and MLP of 12 layers",
        24,
        2**24,
        Recipe("adamw", 0.002, 0.05, max_gradient_norm=1.0, batch_size=16, dataset="python-docs"),
        task="language",
        num_classes=1024,
    ),
}
"""All networks by name."""


def find_network(name: str) -> NetworkFacts:
    """Description of a network.

    Args:
        name: Key of `NETWORKS`.

    Returns:
        The description.

    Raises:
        ResnetPathsError: If the name is unknown; the message contains the most similar names.
    """
    if not isinstance(name, str) or name not in NETWORKS:
        raise ResnetPathsError("name", name, f"one of the known networks, nearest {nearest_names(name, NETWORKS)}")
    return NETWORKS[name]


def check_num_drawn_blocks(name: str, number: object) -> tuple[int, int] | None:
    """Validate the number of blocks that a mini-batch trains.

    Args:
        name: Key of `NETWORKS`.
        number: A number, a pair of minimum and maximum, or None for the default of the network.

    Returns:
        Minimum and maximum; None for a network without drawn blocks.

    Raises:
        ResnetPathsError: If the network has no drawn blocks, or fewer blocks.
    """
    facts = find_network(name)
    if number is None or facts.num_drawn_blocks is None:
        if number is not None:
            raise ResnetPathsError(
                "num_drawn_blocks", number, f"None for {name!r}, which trains all blocks or draws them by probability"
            )
        return facts.num_drawn_blocks
    pair = tuple(number) if isinstance(number, list | tuple) else (number, number)
    is_pair = len(pair) == 2 and all(type(n) is int for n in pair)
    if not is_pair or not 1 <= pair[0] <= pair[1] <= facts.num_blocks:
        raise ResnetPathsError(
            "num_drawn_blocks",
            number,
            f"an int from 1 to {facts.num_blocks}, or a pair of minimum and maximum, for {name!r}",
        )
    return pair[0], pair[1]


def build_network(
    name: str,
    generator: torch.Generator,
    *,
    in_channels: int = 1,
    num_classes: int | None = None,
    num_drawn_blocks: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Build an untrained network in training mode.

    Args:
        name: Key of `NETWORKS`.
        generator: CPU generator of all initial values.
        in_channels: Channels of the image.
        num_classes: Number of logits; None for that of `NETWORKS`.
        num_drawn_blocks: Number of blocks that a mini-batch trains, or a pair of minimum and maximum; only for
            ``"effective-..."``.

    Returns:
        The network, on the CPU, in float32.

    Raises:
        ResnetPathsError: If the name is unknown, `num_drawn_blocks` is invalid for the network, or an argument is of
            another kind.
    """
    facts = find_network(name)
    require_generator("generator", generator)
    in_channels = require_int("in_channels", in_channels, 1)
    num_classes = facts.num_classes if num_classes is None else require_int("num_classes", num_classes, 1)
    drawn = check_num_drawn_blocks(name, num_drawn_blocks)
    options = {} if drawn is None else {"num_drawn_blocks": drawn}
    with torch.device("meta"):
        model = facts.build(in_channels=in_channels, num_classes=num_classes, **options)
    model.to_empty(device="cpu")
    initialise(model, generator)
    return model

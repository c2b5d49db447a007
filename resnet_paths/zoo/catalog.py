"""The networks that can be built by name, what is known of each, and how each is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from resnet_paths.errors import ResnetPathsError, nearest_names
from resnet_paths.zoo.initialisation import initialise
from resnet_paths.zoo.resnet import PlainNet, PreactResNet, ResNet
from resnet_paths.zoo.vgg import VGG

__all__ = ["NETWORKS", "NetworkFacts", "Recipe", "build_network", "find_network"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained unless the settings say otherwise.

    Attributes:
        optimizer: ``"sgd"`` with Nesterov momentum, or ``"adamw"``.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay; of AdamW per unit of learning rate, as torch counts it.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class NetworkFacts:
    """What the project knows of a network before it is built.

    Attributes:
        build: Called with ``in_channels`` and ``num_classes``; returns the module.
        description: One line for people.
        num_blocks: Blocks that `resnet_paths.unravel` finds.
        num_paths: Paths through them, 2^n with skips and 1 without.
        recipe: How it is trained.
        task: What it is trained to do: ``"classification"`` or ``"denoising"``.
    """

    build: Callable[..., nn.Module]
    description: str
    num_blocks: int
    num_paths: int
    recipe: Recipe = Recipe()
    task: str = "classification"


def _preact(depth: int, *, bottleneck: bool = False) -> NetworkFacts:
    layers = 3 if bottleneck else 2
    blocks = (depth - 2) // layers
    return NetworkFacts(
        partial(PreactResNet, depth, bottleneck=bottleneck),
        f"pre-activation ResNet, {blocks} blocks of {layers} convolutions",
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


NETWORKS: dict[str, NetworkFacts] = {
    **{f"preact-resnet-{depth}": _preact(depth) for depth in (20, 32, 44, 56, 110)},
    "preact-resnet-164": _preact(164, bottleneck=True),
    **{f"resnet-{depth}": _resnet(depth) for depth in (20, 32, 44, 56, 110)},
    **{f"plain-{depth}": _plain(depth) for depth in (20, 32, 44, 56, 110)},
    # Without BatchNorm a rate of 0.1 diverges.
    "vgg-15": NetworkFacts(
        VGG, "VGG-like net, 14 blocks of 1 convolution, no skips, no BatchNorm", 14, 1, Recipe(learning_rate=0.02)
    ),
}
"""All networks by name."""


def find_network(name: str) -> NetworkFacts:
    """Facts of the network called `name`.

    Args:
        name: Key of `NETWORKS`.

    Returns:
        Its facts.

    Raises:
        ResnetPathsError: If there is no such network; the nearest names are given.
    """
    if name not in NETWORKS:
        raise ResnetPathsError("name", name, f"one of the known networks, nearest {nearest_names(name, NETWORKS)}")
    return NETWORKS[name]


def build_network(name: str, generator: torch.Generator, *, in_channels: int = 1, num_classes: int = 10) -> nn.Module:
    """An untrained network in training mode, initialised from `generator` alone.

    Args:
        name: Key of `NETWORKS`.
        generator: Source of all random numbers; a CPU generator.
        in_channels: Channels of the image.
        num_classes: Number of logits.

    Returns:
        The module, on the CPU, in float32.

    Raises:
        ResnetPathsError: If the name is unknown.
    """
    facts = find_network(name)
    with torch.device("meta"):
        model = facts.build(in_channels=in_channels, num_classes=num_classes)
    model.to_empty(device="cpu")
    initialise(model, generator)
    return model

"""The networks that come with the project: how each is built, what it is, and its trained weights.

Weights lie in ``data/networks/NAME.safetensors`` with their settings inside, beside ``NAME.csv``, the training log.
They are made by ``resnet-paths train NAME`` and never read through pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from resnet_paths.device import choose_device
from resnet_paths.errors import ResnetPathsError, nearest_names
from resnet_paths.files import shipped_folder
from resnet_paths.zoo.resnet import PlainNet, PreactResNet
from resnet_paths.zoo.weights import read_metadata, read_weights

__all__ = ["NETWORKS", "NetworkFacts", "build_network", "find_network", "list_networks", "load_network"]


@dataclass(frozen=True)
class NetworkFacts:
    """What the project knows of a network before it is built.

    Attributes:
        build: Called with ``in_channels`` and ``num_classes``; returns the module.
        description: One line for people.
        num_blocks: Blocks that `resnet_paths.unravel` finds.
        num_paths: Paths through them, 2^n with skips and 1 without.
    """

    build: Callable[..., nn.Module]
    description: str
    num_blocks: int
    num_paths: int


def _preact(depth: int, *, bottleneck: bool = False) -> NetworkFacts:
    layers = 3 if bottleneck else 2
    blocks = (depth - 2) // layers
    return NetworkFacts(
        partial(PreactResNet, depth, bottleneck=bottleneck),
        f"pre-activation ResNet, {blocks} blocks of {layers} convolutions",
        blocks,
        2**blocks,
    )


def _plain(depth: int) -> NetworkFacts:
    blocks = (depth - 2) // 2
    return NetworkFacts(partial(PlainNet, depth), f"plain net, {blocks} blocks of 2 convolutions, no skips", blocks, 1)


NETWORKS: dict[str, NetworkFacts] = {
    **{f"preact-resnet-{depth}": _preact(depth) for depth in (20, 32, 44, 56, 110)},
    "preact-resnet-164": _preact(164, bottleneck=True),
    **{f"plain-{depth}": _plain(depth) for depth in (20, 32, 44, 56, 110)},
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

    Convolutions are drawn by He's rule (fan-out; He et al. 2015), linear layers by torch's default rule.

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
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model


def load_network(name: str, weights: str | Path | None = None, *, device: str | torch.device = "cpu") -> nn.Module:
    """A trained network in eval mode; ``model.training_log`` is its training log, a row an epoch.

    Args:
        name: Name of a network with shipped weights (see `list_networks`), or of any known network with `weights`.
        weights: A ``.safetensors`` file that ``resnet-paths train`` wrote, instead of the shipped one.
        device: Where to put it; ``"auto"`` is the accelerator if there is one.

    Returns:
        The module, in float32.

    Raises:
        ResnetPathsError: If the name is unknown, no weights are there, or the file is cut short, a pickle, of
            another network, or holds values that are not finite.

    Example:
        >>> model = load_network("preact-resnet-20")
        >>> model.training, model.training_log.epoch.tolist()[-1]
        (False, 12)
    """
    find_network(name)
    path = _weights_file(name) if weights is None else Path(weights)
    if not path.is_file():
        trained = [n for n in NETWORKS if _weights_file(n).is_file()]
        raise ResnetPathsError(
            "name" if weights is None else "weights",
            name if weights is None else str(path),
            f"a network with shipped weights ({', '.join(trained)}) or an existing weights file",
            f"Train it with 'resnet-paths train {name}' and pass the file as weights=.",
        )
    metadata = read_metadata(path)
    shape = {"in_channels": 1, "num_classes": 10}
    for key, default in shape.items():
        shape[key] = metadata.get(key, default)
        if not isinstance(shape[key], int) or not 1 <= shape[key] <= 100_000:
            raise ResnetPathsError(f"{key} of weights file {path}", shape[key], "an int from 1 to 100000")
    model = build_network(name, torch.Generator(), **shape)
    read_weights(path, model, name)
    model.training_log = pd.DataFrame(metadata.get("log", []))  # type: ignore[assignment]
    return model.eval().to(choose_device(device))


def list_networks() -> pd.DataFrame:
    """All known networks: what each is and, where weights are shipped, how good.

    Returns:
        A row a network: ``name``, ``description``, ``num_blocks``, ``num_paths`` (exact int), ``num_parameters``,
        ``trained`` (whether weights are shipped), ``dataset``, ``epochs``, ``seed``, ``test_error_rate`` in [0, 1].

    Example:
        >>> list_networks().set_index("name").num_paths["preact-resnet-20"]
        512
    """
    rows = []
    for name, facts in NETWORKS.items():
        with torch.device("meta"):
            model = facts.build(in_channels=1, num_classes=10)
        path = _weights_file(name)
        metadata = read_metadata(path) if path.is_file() else {}
        rows.append({
            "name": name,
            "description": facts.description,
            "num_blocks": facts.num_blocks,
            "num_paths": facts.num_paths,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "trained": bool(metadata),
            "dataset": metadata.get("dataset"),
            "epochs": metadata.get("epochs"),
            "seed": metadata.get("seed"),
            "test_error_rate": metadata.get("test_error_rate"),
        })
    frame = pd.DataFrame(rows)
    # Python ints, not floats: 2**81 paths are exact.
    frame["num_paths"] = pd.Series([row["num_paths"] for row in rows], dtype=object)
    return frame.astype({"epochs": "Int64", "seed": "Int64", "test_error_rate": "float64"})


def _weights_file(name: str) -> Path:
    return shipped_folder("data") / "networks" / f"{name}.safetensors"

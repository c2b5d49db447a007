"""The networks that come with the project: how each is built, what it is, and its trained weights.

Weights lie in ``data/networks/NAME.safetensors`` with their settings inside, beside ``NAME.csv``, the training log.
They are made by ``resnet-paths train NAME`` and never read through pickle.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import nn

from resnet_paths.device import choose_device
from resnet_paths.errors import ResnetPathsError
from resnet_paths.files import shipped_folder
from resnet_paths.zoo.catalog import NETWORKS, NetworkFacts, Recipe, build_network, find_network
from resnet_paths.zoo.weights import read_metadata, read_weights

__all__ = ["NETWORKS", "NetworkFacts", "Recipe", "build_network", "find_network", "list_networks", "load_network"]


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

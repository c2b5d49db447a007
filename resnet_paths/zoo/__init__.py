"""Networks that come with the project: definitions, descriptions, and trained weights.

Weights are stored in ``data/networks/NAME.safetensors`` together with their settings; ``NAME.csv`` is the training log.
Weights of other seeds are in ``NAME-seed1.safetensors``, snapshots of training in ``NAME.epoch4.safetensors``. Of some
seeds there is only the log, ``NAME-seed2.csv``. The files are written by ``resnet-paths train NAME`` and
``resnet-paths publish``, and are never read with pickle.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from resnet_paths._utils.arguments import require_list, require_path
from resnet_paths._utils.devices import choose_device
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import shipped_folder
from resnet_paths.zoo.catalog import NETWORKS, NetworkFacts, Recipe, build_network, find_network
from resnet_paths.zoo.weights import Metadata, choose_weights, logs_in, read_metadata, read_weights, weights_in

__all__ = [
    "NETWORKS",
    "NetworkFacts",
    "Recipe",
    "build_network",
    "find_network",
    "list_networks",
    "load_network",
    "networks_table",
    "training_logs",
]


def load_network(
    name: str,
    weights: str | Path | None = None,
    *,
    seed: int | None = None,
    snapshot: int | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a trained network in eval mode; ``model.training_log`` is its training log, one row per epoch.

    Args:
        name: Name of a network with shipped weights (see `list_networks`), or of any known network if `weights` is
            given.
        weights: A ``.safetensors`` file written by ``resnet-paths train``, or a folder of such files, instead of the
            shipped weights.
        seed: Seed of the run; by default the lowest available. Runs may differ in epochs, see `training_log`.
        snapshot: Number of epochs after which the weights were saved, 0 for the initialisation; None for the end.
        device: Device of the network; ``"auto"`` is the accelerator if one is available.

    Returns:
        The network, in float32.

    Raises:
        ResnetPathsError: If the name is unknown, there are no weights of this network, seed or snapshot (the message
            lists those available), or the file is truncated, a pickle, of another network, or contains non-finite
            values.

    Example:
        >>> model = load_network("preact-resnet-20")
        >>> model.training, model.training_log.epoch.tolist()[-1]
        (False, 12)
    """
    find_network(name)
    if weights is None and not weights_in(_shipped(), name):
        trained = [n for n in NETWORKS if weights_in(_shipped(), n)]
        raise ResnetPathsError(
            "name",
            name,
            f"a network with shipped weights ({', '.join(trained)}) or an existing weights file",
            f"Install resnet-paths-data, or train it with 'resnet-paths train {name}' and pass the file as weights=.",
        )
    device = choose_device(device)
    path = choose_weights(name, _shipped() if weights is None else require_path("weights", weights), seed, snapshot)
    metadata = read_metadata(path)
    shape = {"in_channels": 1, "num_classes": find_network(name).num_classes}
    for key, default in shape.items():
        shape[key] = metadata.get(key, default)
        if not isinstance(shape[key], int) or not 1 <= shape[key] <= 100_000:
            raise ResnetPathsError(f"{key} of weights file {path}", shape[key], "an int from 1 to 100000")
    drawn = metadata.get("num_drawn_blocks")
    model = build_network(name, torch.Generator(), num_drawn_blocks=drawn, **shape)
    read_weights(path, model, name)
    model.training_log = _log(metadata)  # type: ignore[assignment]
    return model.eval().to(device)


def list_networks() -> pd.DataFrame:
    """List all known networks, with the test error of those with shipped weights.

    Returns:
        One row per network: ``name``, ``description``, ``num_blocks``, ``num_paths`` (exact int), ``num_parameters``,
        ``trained`` (whether weights are shipped), ``dataset``, ``epochs``, ``seeds`` and ``snapshots`` (tuples of ints,
        valid arguments of `load_network`), and for the first seed ``test_error_rate`` in [0, 1], ``test_rmse``, the
        root-mean-square error of a denoiser, or ``test_bits_per_byte`` of a language model.

    Example:
        >>> list_networks().set_index("name").num_paths["preact-resnet-20"]
        512
    """
    rows = []
    for name, facts in NETWORKS.items():
        with torch.device("meta"):
            model = facts.build(in_channels=1, num_classes=facts.num_classes)
        found = weights_in(_shipped(), name)
        seeds = tuple(seed for seed, snapshot in found if snapshot is None)
        metadata = read_metadata(found[seeds[0], None]) if seeds else {}
        rows.append({
            "name": name,
            "description": facts.description,
            "num_blocks": facts.num_blocks,
            "num_paths": facts.num_paths,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "trained": bool(metadata),
            "dataset": metadata.get("dataset"),
            "epochs": metadata.get("epochs"),
            "seeds": seeds,
            "snapshots": tuple(epoch for seed, epoch in found if epoch is not None and seed == seeds[0]),
            "test_error_rate": metadata.get("test_error_rate"),
            "test_rmse": metadata.get("test_rmse"),
            "test_bits_per_byte": metadata.get("test_bits_per_byte"),
        })
    frame = pd.DataFrame(rows)
    # Python ints, which are exact for 2**81 paths, unlike floats.
    frame["num_paths"] = pd.Series([row["num_paths"] for row in rows], dtype=object)
    measures = ("test_error_rate", "test_rmse", "test_bits_per_byte")
    return frame.astype({"epochs": "Int64"} | dict.fromkeys(measures, "float64"))


def training_logs(names: str | Iterable[str] | None = None) -> pd.DataFrame:
    """Training logs of the shipped networks, for all seeds, including seeds whose weights are not shipped.

    Args:
        names: Name or names of networks with shipped weights; all by default.

    Returns:
        One row per network, seed and epoch, in this order: ``network``, ``seed``, ``epoch`` (from 1),
        ``learning_rate``, ``train_loss``, ``train_error_rate``, ``test_loss``, ``test_error_rate``, ``seconds``. For a
        denoiser, error rates are NaN and losses are mean squared errors. Losses of a language model are in nats per
        token, its error rates those of tokens.

    Raises:
        ResnetPathsError: If a name is unknown or has no shipped weights.

    Example:
        >>> training_logs("vgg-15").groupby(["network", "seed"]).test_error_rate.last().round(3).item()
        0.093
    """
    if names is None:
        names = NETWORKS
    elif isinstance(names, str):
        names = [names]
    else:
        names = require_list("names", names, "names of networks, or None for all")
    trained = [name for name in NETWORKS if weights_in(_shipped(), name)]
    for name in names:
        find_network(name)
        if names is not NETWORKS and name not in trained:
            raise ResnetPathsError("names", name, f"networks with shipped weights: {', '.join(trained)}")
    logs = [path for name in names if name in trained for path in logs_in(_shipped(), name).values()]
    return pd.concat([pd.read_csv(path) for path in logs], ignore_index=True)


def networks_table() -> str:
    """Markdown table of the shipped networks, from the metadata of their files.

    Returns:
        One row per network and seed: description, parameters, test error, seed, epochs and training time; without a
        final newline.
    """
    lines = [
        "| network | what | parameters | test error | seed | epochs | training time |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, facts in NETWORKS.items():
        for metadata in _runs(name):
            minutes = round(sum(row["seconds"] for row in metadata["log"]) / 60)
            cells = [
                f"`{name}`",
                facts.description,
                f"{metadata['num_parameters']:,}",
                _judgement(metadata),
                str(metadata["seed"]),
                str(metadata["epochs"]),
                f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _log(metadata: Metadata) -> pd.DataFrame:
    frame = pd.DataFrame(metadata.get("log", []))
    # All None in the log of a network without an error rate.
    rates = frame.columns.intersection(["train_error_rate", "test_error_rate"])
    return frame.astype(dict.fromkeys(rates, "float64"))


def _judgement(metadata: Metadata) -> str:
    if "test_rmse" in metadata:
        return f"RMSE {metadata['test_rmse']:.3f}"
    if "test_bits_per_byte" in metadata:
        return f"{metadata['test_bits_per_byte']:.2f} bits per byte"
    return f"{100 * metadata['test_error_rate']:.2f} %"


def _runs(name: str) -> list[Metadata]:
    """Metadata of the shipped weights of a network, one mapping per seed, without snapshots."""
    found = weights_in(_shipped(), name)
    return [read_metadata(path) for (_, snapshot), path in found.items() if snapshot is None]


def _shipped() -> Path:
    return shipped_folder("data") / "networks"

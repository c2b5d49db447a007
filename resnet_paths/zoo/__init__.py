"""Networks that come with the project: definitions, descriptions, and trained weights.

Weights are stored in ``data/networks/NAME.safetensors`` together with their settings; ``NAME.csv`` is the training log.
Weights of other seeds are in ``NAME-seed1.safetensors``, snapshots of training in ``NAME.epoch4.safetensors``. Of some
seeds there is only the log, ``NAME-seed2.csv``. Networks that were trained on another data set than that of their
recipe are in a folder of it, such as ``data/networks/digits``. The files are written by ``resnet-paths train NAME`` and
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
    "shipped_networks",
    "shipped_weights",
    "training_logs",
]


def load_network(
    name: str,
    weights: str | Path | None = None,
    *,
    dataset: str | None = None,
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
        dataset: Data set on which it was trained; that of the network's recipe by default. Must be None if `weights` is
            given.
        seed: Seed of the run; by default the lowest available. Runs may differ in epochs, see `training_log`.
        snapshot: Number of epochs after which the weights were saved, 0 for the initialisation; None for the end.
        device: Device of the network; ``"auto"`` is the accelerator if one is available.

    Returns:
        The network, in float32.

    Raises:
        ResnetPathsError: If the name is unknown, there are no weights of this network, data set, seed or snapshot (the
            message lists those available), or the file is truncated, a pickle, of another network, or contains
            non-finite values.

    Example:
        >>> model = load_network("preact-resnet-20")
        >>> model.training, model.training_log.epoch.tolist()[-1]
        (False, 12)
    """
    if weights is not None and dataset is not None:
        raise ResnetPathsError("dataset", dataset, "None if weights is given", "Pass the weights of that data set.")
    shipped = shipped_networks(name, dataset)
    if weights is None and not weights_in(shipped, name):
        trained = [n for n in NETWORKS if weights_in(shipped_networks(n, dataset), n)]
        of = "" if dataset is None else f" of {dataset!r}"
        raise ResnetPathsError(
            "name",
            name,
            f"a network with shipped weights{of} ({', '.join(trained) or 'none'}) or an existing weights file",
            f"Install resnet-paths-data, or train it with 'resnet-paths train {name}' and pass the file as weights=.",
        )
    device = choose_device(device)
    path = choose_weights(name, shipped if weights is None else require_path("weights", weights), seed, snapshot)
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


def list_networks(*, dataset: str | None = None) -> pd.DataFrame:
    """List all known networks, with the test error of those with shipped weights.

    Args:
        dataset: Data set on which they were trained; that of each network's recipe by default.

    Returns:
        One row per network: ``name``, ``description``, ``num_blocks``, ``num_paths`` (exact int), ``num_parameters``,
        ``trained`` (whether weights are shipped), ``dataset``, ``epochs``, ``seeds`` and ``snapshots`` (tuples of ints,
        valid arguments of `load_network`), and for the first seed ``test_error_rate`` in [0, 1], ``test_rmse``, the
        root-mean-square error of a denoiser, or ``test_bits_per_byte`` of a language model.

    Raises:
        ResnetPathsError: If `dataset` is not a name.

    Example:
        >>> list_networks().set_index("name").num_paths["preact-resnet-20"]
        512
    """
    rows = []
    for name, facts in NETWORKS.items():
        with torch.device("meta"):
            model = facts.build(in_channels=1, num_classes=facts.num_classes)
        found = weights_in(shipped_networks(name, dataset), name)
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


def training_logs(names: str | Iterable[str] | None = None, *, dataset: str | None = None) -> pd.DataFrame:
    """Training logs of the shipped networks, for all seeds, including seeds whose weights are not shipped.

    Args:
        names: Name or names of networks with shipped logs; all by default.
        dataset: Data set on which they were trained; that of each network's recipe by default.

    Returns:
        One row per network, seed and epoch, in this order: ``network``, ``seed``, ``epoch`` (from 1),
        ``learning_rate``, ``train_loss``, ``train_error_rate``, ``test_loss``, ``test_error_rate``, ``seconds``. For a
        denoiser, error rates are NaN and losses are mean squared errors. Losses of a language model are in nats per
        token, its error rates those of tokens.

    Raises:
        ResnetPathsError: If a name is unknown or has no shipped logs.

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
    found = {name: logs_in(shipped_networks(name, dataset), name) for name in NETWORKS}
    logged = [name for name in NETWORKS if found[name]]
    for name in names:
        find_network(name)
        if (names is not NETWORKS or not logged) and name not in logged:
            raise ResnetPathsError("names", name, f"networks with shipped logs: {', '.join(logged) or 'none'}")
    logs = [path for name in names for path in found[name].values()]
    return pd.concat([pd.read_csv(path) for path in logs], ignore_index=True)


def networks_table() -> str:
    """Markdown table of the shipped networks, from the metadata of their files.

    Returns:
        One row per network, data set and seed: description, data set, parameters, test error, seed, epochs and training
        time; without a final newline.
    """
    lines = [
        "| network | what | data set | parameters | test error | seed | epochs | training time |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, facts in NETWORKS.items():
        for metadata in (
            read_metadata(path) for (_, _, snapshot), path in shipped_weights(name).items() if snapshot is None
        ):
            minutes = round(sum(row["seconds"] for row in metadata["log"]) / 60)
            cells = [
                f"`{name}`",
                facts.description,
                metadata["dataset"],
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


def shipped_networks(name: str, dataset: str | None = None) -> Path:
    """Folder of the shipped files of a network; it may not exist.

    Args:
        name: Name of the network.
        dataset: Data set on which it was trained; that of the network's recipe by default.

    Returns:
        The folder.

    Raises:
        ResnetPathsError: If the name is unknown, or `dataset` is not a name.
    """
    folder, own = shipped_folder("data") / "networks", find_network(name).recipe.dataset
    if dataset is None or dataset == own:
        return folder
    if not isinstance(dataset, str) or Path(dataset).name != dataset:
        raise ResnetPathsError("dataset", dataset, "the name of a data set, such as 'digits'")
    return folder / dataset


def shipped_weights(name: str) -> dict[tuple[str, int, int | None], Path]:
    """Shipped weights files of a network, of all data sets.

    Args:
        name: Name of the network.

    Returns:
        Paths by (data set, seed, snapshot), those of the recipe's data set first.
    """
    own, folder = find_network(name).recipe.dataset, shipped_networks(name)
    others = sorted(path.name for path in folder.glob("*") if path.is_dir())
    return {
        (dataset, *key): path
        for dataset in (own, *others)
        for key, path in weights_in(shipped_networks(name, dataset), name).items()
    }

"""Checkpoints: all that a stopped run needs to go on to the weights that it would have reached without the stop."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce.training.settings import TrainingSettings
from resnet_paths.zoo.places import snapshot_file
from resnet_paths.zoo.weights import read_metadata, read_tensors, write_tensors

__all__ = ["refuse_missed_snapshots", "refuse_other_settings", "resume", "write_checkpoint"]

# What an optimizer keeps of each parameter: the beginning of the tensor's name in a checkpoint, by the optimizer's key.
_KEPT = {
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"average": "exp_avg", "average_of_squares": "exp_avg_sq", "steps": "step"},
}
# What files of the time before a setting existed mean by its absence.
_BEFORE = {"optimizer": "sgd", "num_drawn_blocks": None}


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Any,
    settings: TrainingSettings,
    log: list[dict[str, Any]],
) -> None:
    """Write the state at the end of an epoch, whole or not at all.

    Args:
        path: The ``.safetensors`` file.
        model: The network that Fabric was given.
        optimizer: The optimizer that Fabric was given.
        precision: Fabric's precision plugin, which may hold a loss scale.
        settings: The run's settings.
        log: Its rows so far, one an epoch.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    untouched = []
    for name, parameter in model.named_parameters():
        if parameter not in optimizer.state:
            untouched.append(name)
            continue
        for kept, key in _KEPT[settings.optimizer].items():
            tensors[f"{kept}.{name}"] = optimizer.state[parameter][key]
    # The loss scale of "16-mixed"; nothing at other precisions.
    metadata = {**asdict(settings), "log": log, "scaler": precision.state_dict(), "untouched": untouched}
    write_tensors(path, tensors, metadata)


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Any, settings: TrainingSettings
) -> list[dict[str, Any]]:
    """Put network, optimizer and loss scale back into the state of a checkpoint.

    Args:
        path: The file.
        model: The network, on the device where it is trained.
        optimizer: Its optimizer.
        precision: Fabric's precision plugin.
        settings: The run's settings, held against the file's before.

    Returns:
        The log so far, a row an epoch.

    Raises:
        ResnetPathsError: If the file is not whole, or lacks a part.
    """
    tensors, metadata = read_tensors(path), read_metadata(path)
    try:
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        # Parameters of blocks that no mini-batch has drawn so far; the optimizer knows nothing of them yet.
        untouched = set(metadata.get("untouched", []))
        for name, parameter in model.named_parameters():
            if name in untouched:
                continue
            for kept, key in _KEPT[settings.optimizer].items():
                value = tensors[f"{kept}.{name}"]
                # The step stays a number on the CPU; the others are like the parameter, on its device.
                optimizer.state[parameter][key] = value if key == "step" else torch.empty_like(parameter).copy_(value)
        if metadata.get("scaler"):
            precision.load_state_dict(metadata["scaler"])
        return list(metadata["log"])
    except (KeyError, RuntimeError) as error:
        raise ResnetPathsError(
            f"checkpoint {path}", str(error), "a checkpoint of this network", "Delete it to start again."
        ) from error


def refuse_other_settings(path: Path, settings: TrainingSettings) -> None:
    """Refuse to go on with a file that was made with other settings.

    Args:
        path: A weights file or a checkpoint.
        settings: What is asked for now.

    Raises:
        ResnetPathsError: If a setting differs.
    """
    stored = _BEFORE | read_metadata(path)
    for key, value in json.loads(json.dumps(asdict(settings))).items():
        if stored.get(key) != value:
            raise ResnetPathsError(
                key,
                value,
                f"{stored.get(key)!r}, as in {path}",
                "Pass the same settings to go on, or another folder to start anew.",
            )


def refuse_missed_snapshots(path: Path, weights: Path, snapshots: Iterable[int]) -> None:
    """Refuse snapshots of epochs that the run has passed without keeping them.

    Args:
        path: What the run left so far: its weights or its checkpoint.
        weights: Its weights file, beside which snapshots lie.
        snapshots: Epochs that are asked for.

    Raises:
        ResnetPathsError: If there is such an epoch.
    """
    done = len(read_metadata(path).get("log", ()))
    for epoch in snapshots:
        if epoch <= done and not snapshot_file(weights, epoch).is_file():
            raise ResnetPathsError(
                "snapshots",
                epoch,
                f"epochs after {done}, which {path} has reached, or those kept on the way",
                "Pass another folder to start anew.",
            )

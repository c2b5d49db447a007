"""Checkpoints, from which an interrupted run resumes to the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.reproduce.training.settings import LogRow, TrainingSettings
from resnet_paths.zoo.weights import read_metadata, read_tensors, snapshot_file, write_tensors

if TYPE_CHECKING:
    from lightning_fabric.plugins.precision import Precision

__all__ = ["check_settings", "check_snapshots", "resume", "write_checkpoint"]

# State of an optimizer per parameter: prefix of the tensor's name in a checkpoint, and key of the optimizer's state.
_OPTIMIZER_STATE = {
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"average": "exp_avg", "average_of_squares": "exp_avg_sq", "steps": "step"},
}
# Settings of files that were written before these settings existed.
_DEFAULTS = {"optimizer": "sgd", "num_drawn_blocks": None, "max_gradient_norm": None}


def write_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    settings: TrainingSettings,
    log: list[LogRow],
) -> None:
    """Write the state at the end of an epoch, atomically.

    Args:
        path: The ``.safetensors`` file.
        model: The network before the setup by Fabric.
        optimizer: The optimizer before the setup by Fabric.
        precision: Fabric's precision plugin, which may have a loss scale.
        settings: The training settings.
        log: The log so far, one row per epoch.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    untouched = []
    for name, parameter in model.named_parameters():
        if parameter not in optimizer.state:
            untouched.append(name)
            continue
        for kept, key in _OPTIMIZER_STATE[settings.optimizer].items():
            tensors[f"{kept}.{name}"] = optimizer.state[parameter][key]
    # The loss scale of "16-mixed"; empty for other precisions.
    metadata = {**asdict(settings), "log": log, "scaler": precision.state_dict(), "untouched": untouched}
    write_tensors(path, tensors, metadata)


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, settings: TrainingSettings
) -> list[LogRow]:
    """Restore network, optimizer and loss scale from a checkpoint.

    Args:
        path: The file.
        model: The network, on the training device.
        optimizer: The optimizer.
        precision: Fabric's precision plugin.
        settings: The training settings, already checked against the file.

    Returns:
        The log so far, one row per epoch.

    Raises:
        ResnetPathsError: If the file is incomplete.
    """
    tensors, metadata = read_tensors(path), read_metadata(path)
    try:
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        # Parameters of blocks that no mini-batch has drawn so far have no optimizer state.
        untouched = set(metadata.get("untouched", []))
        for name, parameter in model.named_parameters():
            if name in untouched:
                continue
            for kept, key in _OPTIMIZER_STATE[settings.optimizer].items():
                value = tensors[f"{kept}.{name}"]
                # The step is on the CPU; other tensors are on the device of the parameter.
                optimizer.state[parameter][key] = value if key == "step" else torch.empty_like(parameter).copy_(value)
        if metadata.get("scaler"):
            precision.load_state_dict(metadata["scaler"])
        return list(metadata["log"])
    except (KeyError, RuntimeError) as error:
        raise ResnetPathsError(
            f"checkpoint {path}", str(error), "a checkpoint of this network", "Delete it to start again."
        ) from error


def check_settings(path: Path, settings: TrainingSettings) -> None:
    """Check that a file was written with the same settings.

    Args:
        path: A weights file or a checkpoint.
        settings: The training settings.

    Raises:
        ResnetPathsError: If a setting differs.
    """
    stored = _DEFAULTS | read_metadata(path)
    for key, value in json.loads(json.dumps(asdict(settings))).items():
        if stored.get(key) != value:
            raise ResnetPathsError(
                key,
                value,
                f"{stored.get(key)!r}, as in {path}",
                "Pass the same settings to resume, or another folder to start a new run.",
            )


def check_snapshots(path: Path, weights: Path, snapshots: Iterable[int]) -> None:
    """Check that the run can still save, or has saved, the requested snapshots.

    Args:
        path: The weights or the checkpoint of the run.
        weights: The weights file of the run, which determines the names of snapshots.
        snapshots: Requested epochs.

    Raises:
        ResnetPathsError: If an epoch has passed without a snapshot.
    """
    done = len(read_metadata(path).get("log", ()))
    for epoch in snapshots:
        if epoch <= done and not snapshot_file(weights, epoch).is_file():
            raise ResnetPathsError(
                "snapshots",
                epoch,
                f"epochs after {done}, the number of epochs in {path}, or epochs with a saved snapshot",
                "Pass another folder to start a new run.",
            )

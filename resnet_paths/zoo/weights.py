"""Weights files: safetensors with settings in their metadata, validated before a network is changed.

Files are named ``NAME-seedS.safetensors``, and ``NAME-seedS.epochE.safetensors`` for snapshots of training. Shipped
weights of seed 0 are named ``NAME.safetensors`` and ``NAME.epochE.safetensors``. The metadata have one entry,
``resnet_paths``, a JSON object with the network's name, its training settings, its log and its test error. Pickle is
never used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import write_then_rename
from resnet_paths._utils.fingerprint import fingerprint

__all__ = [
    "Metadata",
    "choose_weights",
    "logs_in",
    "read_checked",
    "read_metadata",
    "read_tensors",
    "read_weights",
    "snapshot_file",
    "weights_in",
    "write_tensors",
]

Metadata: TypeAlias = dict[str, Any]
"""What a weights file holds beside its tensors: a JSON object, as `json.loads` returns it."""

_ENTRY = "resnet_paths"
_CHECKSUM = "sha256"  # of tensors and metadata; files of other programs have none
_ADVICE = "Weights files are written by 'resnet-paths train'; convert others with safetensors.torch.save_file."


def snapshot_file(weights: Path, epoch: int) -> Path:
    """The file of the snapshot after `epoch` epochs that belongs to a weights file; 0 is the initialisation."""
    return weights.with_name(f"{weights.stem}.epoch{epoch}.safetensors")


def weights_in(folder: Path, network: str) -> dict[tuple[int, int | None], Path]:
    """Weights files of a network in a folder.

    Args:
        folder: The folder; it may not exist.
        network: Name of the network.

    Returns:
        Paths by (seed, snapshot), sorted; the snapshot is None for the end of training.
    """
    name = re.compile(rf"{re.escape(network)}(?:-seed(\d+))?(?:\.epoch(\d+))?\.safetensors")
    matches = [(name.fullmatch(path.name), path) for path in folder.glob(f"{network}*.safetensors")]
    found = {(int(m[1] or 0), None if m[2] is None else int(m[2])): path for m, path in matches if m}
    return dict(sorted(found.items(), key=lambda item: (item[0][0], -1 if item[0][1] is None else item[0][1])))


def logs_in(folder: Path, network: str) -> dict[int, Path]:
    """Training logs of a network in a folder.

    Args:
        folder: The folder; it may not exist.
        network: Name of the network.

    Returns:
        Paths by seed, sorted.
    """
    name = re.compile(rf"{re.escape(network)}(?:-seed(\d+))?\.csv")
    matches = [(name.fullmatch(path.name), path) for path in folder.glob(f"{network}*.csv")]
    return dict(sorted((int(m[1] or 0), path) for m, path in matches if m))


def choose_weights(network: str, weights: Path, seed: int | None, snapshot: int | None) -> Path:
    """Select a weights file.

    Args:
        network: Name of the network.
        weights: A weights file, or a folder of weights files.
        seed: Seed of the run; by default the lowest available. Must be None if `weights` is a file.
        snapshot: Number of epochs after which the weights were saved; None for the end of training.

    Returns:
        Path of an existing file.

    Raises:
        ResnetPathsError: If there is no such file; the message lists the available ones.
    """
    if weights.is_file():
        if seed is not None:
            raise ResnetPathsError("seed", seed, "None if weights is a file", "Pass the file of that seed.")
        name = re.compile(rf"{re.escape(weights.stem)}\.epoch(\d+)\.safetensors")
        matches = [(name.fullmatch(path.name), path) for path in weights.parent.iterdir()]
        kept = {None: weights} | {int(m[1]): path for m, path in matches if m}
    else:
        found = weights_in(weights, network)
        if not found:
            raise ResnetPathsError(
                "weights",
                str(weights),
                f"an existing weights file of {network!r} or a folder that contains one",
                f"Train it with 'resnet-paths train {network}' and pass the file as weights=.",
            )
        seeds = sorted({s for s, _ in found})
        seed = seeds[0] if seed is None else seed
        if seed not in seeds:
            raise ResnetPathsError("seed", seed, f"one of {_listed(seeds)}, the seeds of {network!r} in {weights}")
        kept = {e: path for (s, e), path in found.items() if s == seed}
    if not isinstance(snapshot, int | None) or snapshot not in kept:
        epochs = sorted(e for e in kept if e is not None)
        raise ResnetPathsError(
            "snapshot",
            snapshot,
            f"None for the end of training, or the epoch of a snapshot: {_listed(epochs)}",
            f"These are the snapshots of {network!r} in {weights}.",
        )
    return kept[snapshot]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors and metadata to a file, atomically.

    Args:
        path: The ``.safetensors`` file.
        tensors: Tensors by name, on any device.
        metadata: A mapping that can be converted to JSON.
    """
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    entry = json.dumps(dict(metadata))
    with write_then_rename(path) as temporary:
        save_file(plain, temporary, metadata={_ENTRY: entry, _CHECKSUM: _checksum(entry, plain)})


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of a weights file, without its tensors.

    Args:
        path: The ``.safetensors`` file.

    Returns:
        The mapping given to `write_tensors`; empty for files of other programs.

    Raises:
        ResnetPathsError: If the file is missing, truncated, a pickle, or not a safetensors file.
    """
    return _metadata_of(path, _entries_of(path))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a weights file, on the CPU.

    Args:
        path: The ``.safetensors`` file.

    Returns:
        Tensors by name.

    Raises:
        ResnetPathsError: If the file is missing, truncated, a pickle, not a safetensors file, has another checksum than
            it states, or contains non-finite values.
    """
    return read_checked(path)[1]


def read_checked(path: Path, *, needs_checksum: bool = False) -> tuple[Metadata, dict[str, torch.Tensor]]:
    """Read metadata and tensors of a file and verify its checksum.

    Args:
        path: The ``.safetensors`` file.
        needs_checksum: Whether a file without a checksum, such as those of other programs, is refused.

    Returns:
        Metadata, and tensors by name, on the CPU.

    Raises:
        ResnetPathsError: As `read_tensors`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    entries = _entries_of(path)
    metadata = _metadata_of(path, entries)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ResnetPathsError(f"weights file {path}", str(error), "a complete safetensors file", _ADVICE) from error
    stated = entries.get(_CHECKSUM)
    if (needs_checksum or stated is not None) and stated != _checksum(entries.get(_ENTRY, ""), tensors):
        raise ResnetPathsError(
            f"weights file {path}",
            "a checksum that differs" if stated else "no checksum",
            "a file as it was written",
            "It was changed since: restore it, or delete it and make it again.",
        )
    for name, tensor in tensors.items():
        _check_finite(path, name, tensor)
    return metadata, tensors


def _entries_of(path: Path) -> dict[str, str]:
    """The metadata of a file as they are stored."""
    from safetensors import SafetensorError, safe_open

    _check_not_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ResnetPathsError(f"weights file {path}", str(error), "a complete safetensors file", _ADVICE) from error


def _metadata_of(path: Path, entries: Mapping[str, str]) -> Metadata:
    try:
        metadata = json.loads(entries.get(_ENTRY, "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ResnetPathsError(
            f"weights file {path}", f"{type(error).__name__}: {error}", f"a JSON object as its metadata {_ENTRY!r}"
        ) from error
    if not isinstance(metadata, dict):
        raise ResnetPathsError(f"weights file {path}", metadata, f"a JSON object as its metadata {_ENTRY!r}", _ADVICE)
    log = metadata.get("log", [])
    if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
        raise ResnetPathsError(f"log of weights file {path}", log, "a list of one JSON object for each epoch", _ADVICE)
    return metadata


def _checksum(entry: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return fingerprint(entry, sorted(tensors.items()))


def read_weights(path: Path, model: nn.Module, network: str) -> None:
    """Load a weights file into a network; the network is not changed if the file is invalid.

    Args:
        path: The ``.safetensors`` file.
        model: The network, on any device; values are converted to its dtypes.
        network: Its name, compared with the name in the file.

    Raises:
        ResnetPathsError: See `read_tensors`; also if the file belongs to another network, or names, shapes or dtypes do
            not match.
    """
    metadata, tensors = read_checked(path)
    stated = metadata.get("network", network)
    if stated != network:
        raise ResnetPathsError(f"weights file {path}", f"weights of {stated!r}", f"weights of {network!r}")
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = tensors.get(name), expected.get(name)
        if have is None or want is None or have.shape != want.shape:
            raise ResnetPathsError(
                f"weights file {path}",
                f"{name!r} {'missing' if have is None else list(have.shape)}",
                f"{'no such tensor' if want is None else list(want.shape)} for {network!r}",
                "The file belongs to another network.",
            )
        if have.is_floating_point() != want.is_floating_point() or have.is_complex():
            raise ResnetPathsError(
                f"weights file {path}", f"{name!r} of {have.dtype}", f"a tensor like {want.dtype}", _ADVICE
            )
        tensors[name] = have.to(want.dtype)
        _check_finite(path, name, tensors[name])  # a float64 value may overflow in float32
    model.load_state_dict(tensors)


def _check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # isfinite does not support 8-bit floats
    if not bool(torch.isfinite(tensor).all()):
        raise ResnetPathsError(
            f"weights file {path}", f"NaN or infinity in {name!r}", "finite values", "Train it again."
        )


def _check_not_pickle(path: Path) -> None:
    if not path.is_file():
        raise ResnetPathsError("weights file", str(path), "an existing file")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header, whose bytes may equal those of a pickle.
    is_safetensors = start[4:] == b"\0\0\0\0{"
    # Pickles of protocol 2 to 5 (torch.save's old format is one) and torch.save's zip format.
    is_pickle = (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5") or start[:4] == b"PK\3\4"
    if is_pickle and not is_safetensors:
        raise ResnetPathsError(
            f"weights file {path}", "a pickle", "a safetensors file, since a pickle can run code when read", _ADVICE
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"

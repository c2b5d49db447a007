"""Weights files: safetensors with the settings inside, checked before a single value reaches a network.

The file's metadata holds one entry, ``resnet_paths``, a JSON object: the network's name, its training settings,
its log and its test error. Nothing is ever read through pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import write_then_rename

__all__ = ["read_metadata", "read_tensors", "read_weights", "write_tensors"]

_ENTRY = "resnet_paths"
_ADVICE = "Weights files are written by 'resnet-paths train'; convert others with safetensors.torch.save_file."


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able mapping to `path`, whole or not at all.

    Args:
        path: The ``.safetensors`` file.
        tensors: Tensors by name, on any device.
        metadata: What the file says of itself.
    """
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with write_then_rename(path) as temporary:
        save_file(plain, temporary, metadata={_ENTRY: json.dumps(dict(metadata))})


def read_metadata(path: Path) -> dict[str, Any]:
    """What a weights file says of itself; reads the header only.

    Args:
        path: The ``.safetensors`` file.

    Returns:
        The mapping given to `write_tensors`; empty if another program wrote the file.

    Raises:
        ResnetPathsError: If the file is missing, cut short, a pickle, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
        metadata = json.loads(entries.get(_ENTRY, "{}"))
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ResnetPathsError(f"weights file {path}", str(error), "a whole safetensors file", _ADVICE) from error
    if not isinstance(metadata, dict):
        raise ResnetPathsError(f"weights file {path}", metadata, f"a JSON object as its metadata {_ENTRY!r}", _ADVICE)
    return metadata


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a weights file, on the CPU.

    Args:
        path: The ``.safetensors`` file.

    Returns:
        Tensors by name.

    Raises:
        ResnetPathsError: If the file is missing, cut short, a pickle, not safetensors, or holds values that are not
            finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _refuse_pickle(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ResnetPathsError(f"weights file {path}", str(error), "a whole safetensors file", _ADVICE) from error
    for name, tensor in tensors.items():
        _refuse_not_finite(path, name, tensor)
    return tensors


def read_weights(path: Path, model: nn.Module, network: str) -> None:
    """Fill `model` with the tensors of a weights file; `model` is untouched if anything is wrong with them.

    Args:
        path: The ``.safetensors`` file.
        model: The network to fill, on any device; values are converted to its dtypes.
        network: Its name, held against the name in the file.

    Raises:
        ResnetPathsError: As `read_tensors`, or if the file is of another network or names, shapes or kinds of numbers
            do not fit.
    """
    stated = read_metadata(path).get("network", network)
    if stated != network:
        raise ResnetPathsError(f"weights file {path}", f"weights of {stated!r}", f"weights of {network!r}")
    tensors = read_tensors(path)
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = tensors.get(name), expected.get(name)
        if have is None or want is None or have.shape != want.shape:
            raise ResnetPathsError(
                f"weights file {path}",
                f"{name!r} {'missing' if have is None else list(have.shape)}",
                f"{'no such tensor' if want is None else list(want.shape)} for {network!r}",
                "The file is of another network.",
            )
        if have.is_floating_point() != want.is_floating_point() or have.is_complex():
            raise ResnetPathsError(
                f"weights file {path}", f"{name!r} of {have.dtype}", f"a tensor like {want.dtype}", _ADVICE
            )
        tensors[name] = have.to(want.dtype)
        _refuse_not_finite(path, name, tensors[name])  # a float64 may be too large for a float32
    model.load_state_dict(tensors)


def _refuse_not_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # the 8-bit kinds know no isfinite
    if not bool(torch.isfinite(tensor).all()):
        raise ResnetPathsError(
            f"weights file {path}", f"NaN or infinity in {name!r}", "finite values", "Train it again."
        )


def _refuse_pickle(path: Path) -> None:
    if not path.is_file():
        raise ResnetPathsError("weights file", str(path), "an existing file")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header, which may happen to look like either of the two.
    is_safetensors = start[4:] == b"\0\0\0\0{"
    # Pickles of protocol 2 to 5 (torch.save's old format is one) and torch.save's zip format.
    is_pickle = (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5") or start[:4] == b"PK\3\4"
    if is_pickle and not is_safetensors:
        raise ResnetPathsError(
            f"weights file {path}", "a pickle", "a safetensors file, since a pickle can run code when read", _ADVICE
        )

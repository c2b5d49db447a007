"""Chains kept in a folder, so that a model is exported once: `unravel(..., cache=FOLDER)`.

    FOLDER/KEY.json   a chain as plain data (`resnet_paths.unraveling.records`), with a checksum

KEY is a fingerprint of all that a chain depends on: the code and the attributes of the model, shapes and dtypes of its
tensors and of the example, the arguments, torch and this package. Of another model, or after any change, the key is
another one, and the model is exported again. The weights are not written; the chain has those of the model at hand.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

import resnet_paths
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import write_then_rename
from resnet_paths._utils.reached import fingerprint_with_code
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.signature import Signature
from resnet_paths.unraveling.records import Record, Unwritable, read_chain, write_chain

__all__ = ["Kept"]

_FORMAT = 1


class Kept:
    """The place of one chain in a folder.

    Args:
        folder: The folder; it is made when a chain is written.
        model: The model, before it runs.
        signature: How it is called.
        tensors: The tensors of the example.
        options: What else decides which chain is read.

    Raises:
        ResnetPathsError: If `folder` is no path, or is a file.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        signature: Signature,
        tensors: Sequence[torch.Tensor],
        options: Sequence[object],
    ) -> None:
        if not isinstance(folder, str | os.PathLike) or not str(folder) or Path(folder).is_file():
            raise ResnetPathsError("cache", folder, "a folder that can be written to")
        forms = [(str(x.dtype), tuple(x.shape), str(x.device)) for x in tensors]
        devices = ("cpu", *{x.device.type for x in tensors} - {"cpu", "meta"})
        autocast = [torch.get_autocast_dtype(each) for each in devices if torch.is_autocast_enabled(each)]
        given = [str(signature.spec), signature.constants, signature.is_tensor, forms, list(options)]
        settings = [_FORMAT, _own_code(), torch.__version__, torch.get_default_dtype(), autocast]
        self._folder = Path(folder)
        self.key = fingerprint_with_code(model, given, settings)

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder / f"{self.key}.json"

    def read(self, model: nn.Module, signature: Signature | None) -> tuple[ResidualChain, set[torch.dtype]] | None:
        """The chain that is kept, with the model's tensors.

        Args:
            model: The model, after it ran, so that hooks without effect are silent.
            signature: How the chain is called; None for tensors in a row.

        Returns:
            The chain, and the floating dtypes that its model computes in; None if there is none. A file that is
            damaged, or not of this model, gives a warning.
        """
        tables = [t for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks)]
        everywhere = nn.modules.module
        tables += [everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks]
        self.key = fingerprint_with_code(self.key, [list(table.values()) for table in tables])
        if not self.path.exists():
            return None
        try:
            record = self._record()
            dtypes = {getattr(torch, name) for name in record["dtypes"]}
            return read_chain(record, model, signature), dtypes
        except Exception as error:  # whatever a foreign file leads to
            _warn(f"{self.path} cannot be read and is written again: {type(error).__name__}: {error}")
            return None

    def _record(self) -> Record:
        written = json.loads(self.path.read_bytes())
        if written["key"] != self.key or written["checksum"] != _checksum(written["record"]):
            raise ValueError("it was changed, or belongs to another model")
        return written["record"]

    def write(self, chain: ResidualChain, model: nn.Module, dtypes: Iterable[torch.dtype]) -> None:
        """Keep a chain; where that is not possible there is a warning.

        Args:
            chain: The chain, once it has passed all checks.
            model: The model that it was read from.
            dtypes: The floating dtypes that it computes in.
        """
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        try:
            record = json.loads(json.dumps(write_chain(chain, model) | {"dtypes": names}))
            with write_then_rename(self.path) as path:
                path.write_text(json.dumps({"key": self.key, "checksum": _checksum(record), "record": record}))
        except Unwritable as error:
            _warn(f"this chain cannot be kept, since it has {error}")
        except OSError as error:
            _warn(f"this chain is not kept: {error}")


def _warn(message: str) -> None:
    warnings.warn(f"cache: {message}", stacklevel=4)


def _checksum(record: object) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@functools.cache
def _own_code() -> str:
    """The code of this package that reads models: its version alone does not tell in a checkout."""
    root = Path(resnet_paths.__file__).parent
    files = sorted(path for wing in ("unraveling", "core") for path in (root / wing).rglob("*.py"))
    return fingerprint_with_code(resnet_paths.__version__, *(path.read_bytes() for path in files))

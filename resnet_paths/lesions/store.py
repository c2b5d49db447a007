"""A folder of finished batches: a study that was stopped resumes where it was.

    STORE/CONTEXT/study.json                what the results have in common, for people
    STORE/CONTEXT/BATCH-LESIONS.safetensors what some lesions did on one batch

CONTEXT is a fingerprint of measures, precision, layout, BatchNorm treatment and code version; BATCH one of the images
and labels; each lesion in a part has a fingerprint of the whole lesioned network, and of the intact one where a measure
reads its outputs (`resnet_paths.lesions.keys`). So results of other models or data sets may be in the same folder and
are never mixed in. A part holds all of these in full, and a checksum: one that was changed, or is stored under the name
of another, is computed again. Parts are written under a temporary name and renamed; two studies at once write the same
rows to the same names. What a killed study was writing remains under its temporary name, which no study takes for a
part; a study that begins an hour later removes it. A study that finds all its results writes nothing, so that a store
may be on a read-only file system.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import resnet_paths
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import write_then_rename
from resnet_paths._utils.fingerprint import fingerprint
from resnet_paths.core.inputs import Inputs
from resnet_paths.lesions.results import Sums, rows_of
from resnet_paths.zoo.weights import read_checked, write_tensors

__all__ = ["Store"]

_FORMAT = 4
_DIGITS = 16
_STALE_AFTER = 3600.0  # seconds; a part is written in far less


class Store:
    """The results of one context in a folder.

    Args:
        folder: Made if it is not there.
        settings: What all results have in common besides the version of the code; JSON-able.

    Raises:
        ResnetPathsError: If the folder is new and cannot be written to.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object]) -> None:
        about = {
            "format": _FORMAT,
            "resnet_paths": resnet_paths.__version__,
            "torch": torch.__version__.split("+")[0],
            **settings,
        }
        self._context = fingerprint(json.dumps(about, sort_keys=True))
        self._warned = False
        self.folder = Path(folder) / self._context[:_DIGITS]
        self._description = json.dumps(about, indent=1, sort_keys=True) + "\n"
        self._is_writable = False  # as far as is known
        if not self._has_description():
            self.require_writable()
        self._warn_of_other_versions(about)
        self._parts: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            self._parts.setdefault(path.name.split("-")[0], []).append(path)
        for path in self.folder.glob(".unfinished-*"):
            with contextlib.suppress(OSError):  # another study may have removed it, or finished it
                if time.time() - path.stat().st_mtime > _STALE_AFTER:
                    path.unlink()

    def require_writable(self) -> None:
        """Validate that results can be written, before any are computed.

        Raises:
            ResnetPathsError: If they cannot, as on a read-only file system.
        """
        if self._is_writable:
            return
        try:
            with write_then_rename(self.folder / "study.json") as temporary:
                temporary.write_text(self._description)
        except OSError as error:
            raise ResnetPathsError(
                "store",
                str(self.folder.parent),
                "a folder that can be written to, or one that has all results",
                f"{error}. Pass another folder, or a copy of this one.",
            ) from error
        self._is_writable = True

    @staticmethod
    def batch_key(inputs: Inputs, labels: torch.Tensor | None) -> str:
        """Fingerprint of a batch's content.

        Args:
            inputs: A tensor [batch, ...], a tuple or a mapping of tensors and others.
            labels: [batch, ...], or None.

        Returns:
            64 hexadecimal digits.
        """
        return fingerprint(inputs, labels)

    def read(self, batch: str, lesions: Sequence[str], num_examples: int) -> dict[str, Sums]:
        """What is known of a batch.

        Args:
            batch: From `batch_key`.
            lesions: Fingerprints of lesioned networks.
            num_examples: Of the batch.

        Returns:
            A result of one row for each lesion that was finished; a part that cannot be read, or is not of this batch,
            is left out. The first such part of a study gives a warning.
        """
        wanted = set(lesions)
        found: dict[str, Sums] = {}
        for path in self._parts.get(batch[:_DIGITS], ()):
            try:
                names, result = _read_part(path, {"context": self._context, "batch": batch}, num_examples)
            except _UNREADABLE as error:
                if not self._warned:
                    warnings.warn(
                        f"store: {path} cannot be read and is computed again: {error} (Others give no warning.)",
                        stacklevel=3,
                    )
                self._warned = True
                continue
            found |= {name: rows_of(result, [row]) for row, name in enumerate(names) if name in wanted}
        return found

    def write(self, batch: str, lesions: Sequence[str], result: Sums) -> None:
        """Keep the result of a batch.

        Args:
            batch: From `batch_key`.
            lesions: Fingerprints of lesioned networks, one per row of the result.
            result: The result.

        Raises:
            ResnetPathsError: If it cannot be written, such as to a full disk; what was kept before stays.
        """
        # In one order, so that studies that name the same lesions in another order write the same.
        order = sorted(range(len(lesions)), key=lesions.__getitem__)
        names = [lesions[row] for row in order]
        path = self.folder / f"{batch[:_DIGITS]}-{fingerprint(names)[:_DIGITS]}.safetensors"
        sums = rows_of(result, order)
        # Compressed bytes: most sums are small counts, and a lesion may well make some infinite, which a file of
        # weights refuses.
        packed = {name: zlib.compress(np.ascontiguousarray(values).tobytes(), 1) for name, values in sums.items()}
        tensors = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in packed.items()}
        forms = {name: [str(values.dtype), list(values.shape)] for name, values in sums.items()}
        metadata = {"context": self._context, "batch": batch, "lesions": names, "forms": forms}
        try:
            write_tensors(path, tensors, metadata)
        except Exception as error:  # safetensors wraps a full disk in an error of its own
            raise ResnetPathsError(
                "store",
                str(path),
                "a folder with space left that can be written to",
                f"{error}. Finished batches are kept: make room and run the study again.",
            ) from error
        self._parts.setdefault(batch[:_DIGITS], []).append(path)

    def _has_description(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return (self.folder / "study.json").read_text() == self._description
        return False

    def _warn_of_other_versions(self, about: Mapping[str, object]) -> None:
        others = set()
        for path in self.folder.parent.glob("*/study.json"):
            try:
                stated = json.loads(path.read_text())
                version = f"resnet_paths {stated['resnet_paths']} with torch {stated['torch']}"
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                version = f"unknown ({path.parent.name})"
            others.add(version)
        others.discard(f"resnet_paths {about['resnet_paths']} with torch {about['torch']}")
        if others:
            warnings.warn(
                f"store {self.folder.parent}: results of {', '.join(sorted(others))} are stored there too; not used",
                stacklevel=4,
            )


_UNREADABLE = (ResnetPathsError, KeyError, ValueError, RuntimeError, TypeError, OSError, zlib.error, MemoryError)


def _read_part(path: Path, stated: Mapping[str, str], num_examples: int) -> tuple[list[str], Sums]:
    """Lesions and result of a part, once it is known to be the one with these keys."""
    metadata, tensors = read_checked(path, needs_checksum=True)
    for key, value in stated.items():
        if metadata[key] != value:
            raise ResnetPathsError("store", f"a part of another {key}", f"the {key} that its name says")
    names = metadata["lesions"]
    sums = {}
    for name, (dtype, shape) in metadata["forms"].items():
        if [len(names), num_examples] != shape[:2] or not all(type(n) is int and n >= 0 for n in shape):
            raise ResnetPathsError("store", shape, f"{name} of {len(names)} lesions and {num_examples} examples")
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        # No more than there should be, whatever was compressed; one byte more tells that there is more.
        data = zlib.decompressobj().decompress(tensors[name].numpy().tobytes(), size + 1)
        if len(data) != size:
            raise ResnetPathsError("store", f"{len(data)} bytes of {name}", f"{size} bytes")
        sums[name] = np.frombuffer(data, kind).reshape(shape)
    if not sums:
        raise ResnetPathsError("store", "no sums", "a part with the sums of at least one measure")
    return names, sums

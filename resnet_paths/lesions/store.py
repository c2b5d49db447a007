"""A folder of finished batches: a study that was stopped resumes where it was.

    STORE/CONTEXT/study.json                what the results have in common, for people
    STORE/CONTEXT/BATCH-LESIONS.safetensors what some lesions did on one batch

CONTEXT is a fingerprint of measures, precision, layout, BatchNorm treatment and code version; BATCH one of the images
and labels; each lesion in a part has a fingerprint of the whole lesioned network (`resnet_paths.lesions.keys`). So
results of other models or data sets may be in the same folder and are never mixed in. Parts hold a checksum, and are
written under a temporary name and renamed; two studies at once write the same rows to the same names. What a killed
study was writing remains under its temporary name, which no study takes for a part; a study that begins an hour later
removes it.
"""

from __future__ import annotations

import contextlib
import json
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
from resnet_paths.lesions.results import BatchResult
from resnet_paths.zoo.weights import read_metadata, read_tensors, write_tensors

__all__ = ["Store"]

_FORMAT = 2
_DIGITS = 16
_STALE_AFTER = 3600.0  # seconds; a part is written in far less


class Store:
    """The results of one context in a folder.

    Args:
        folder: Made if it is not there.
        settings: What all results have in common besides the version of the code; JSON-able.

    Raises:
        ResnetPathsError: If the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object]) -> None:
        about = {
            "format": _FORMAT,
            "resnet_paths": resnet_paths.__version__,
            "torch": torch.__version__.split("+")[0],
            **settings,
        }
        self.folder = Path(folder) / fingerprint(json.dumps(about, sort_keys=True))[:_DIGITS]
        try:
            self._write_description(about)
        except OSError as error:
            raise ResnetPathsError(
                "store", str(folder), "a folder that can be written to", f"{error}. Pass another folder."
            ) from error
        self._warn_of_other_versions(about)
        self._parts: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            self._parts.setdefault(path.name.split("-")[0], []).append(path)
        for path in self.folder.glob(".unfinished-*"):
            with contextlib.suppress(OSError):  # another study may have removed it, or finished it
                if time.time() - path.stat().st_mtime > _STALE_AFTER:
                    path.unlink()

    @staticmethod
    def batch_key(inputs: Inputs, labels: torch.Tensor | None) -> str:
        """Fingerprint of a batch's content.

        Args:
            inputs: A tensor [batch, ...], a tuple or a mapping of tensors and others.
            labels: [batch, ...], or None.

        Returns:
            Hexadecimal digits.
        """
        return fingerprint(inputs, labels)[:_DIGITS]

    def read(self, batch: str, lesions: Sequence[str]) -> dict[str, BatchResult]:
        """What is known of a batch.

        Args:
            batch: From `batch_key`.
            lesions: Fingerprints of lesioned networks.

        Returns:
            A result of one row for each lesion that was finished; a part that cannot be read is left out, with a
            warning.
        """
        wanted = set(lesions)
        found: dict[str, BatchResult] = {}
        for path in self._parts.get(batch, ()):
            try:
                names, result = _read_part(path)
            except (ResnetPathsError, KeyError, ValueError, RuntimeError, TypeError, OSError, zlib.error) as error:
                warnings.warn(f"store: {path} cannot be read and is computed again: {error}", stacklevel=3)
                continue
            found |= {name: result.row(row) for row, name in enumerate(names) if name in wanted}
        return found

    def write(self, batch: str, lesions: Sequence[str], result: BatchResult) -> None:
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
        path = self.folder / f"{batch}-{fingerprint(names)[:_DIGITS]}.safetensors"
        sums = {name: values[order] for name, values in result.sums.items()}
        # Compressed bytes: most sums are small counts, and a lesion may well make some infinite, which a file of
        # weights refuses.
        packed = {name: zlib.compress(np.ascontiguousarray(values).tobytes(), 1) for name, values in sums.items()}
        tensors = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in packed.items()}
        forms = {name: [str(values.dtype), list(values.shape)] for name, values in sums.items()}
        metadata = {"lesions": names, "forms": forms, "checksum": _checksum(names, tensors)}
        try:
            write_tensors(path, tensors, metadata)
        except Exception as error:  # safetensors wraps a full disk in an error of its own
            raise ResnetPathsError(
                "store",
                str(path),
                "a folder with space left that can be written to",
                f"{error}. Finished batches are kept: make room and run the study again.",
            ) from error
        self._parts.setdefault(batch, []).append(path)

    def _write_description(self, about: Mapping[str, object]) -> None:
        # Written even where it is there: a store that cannot be written to is to be found out before any work.
        with write_then_rename(self.folder / "study.json") as temporary:
            temporary.write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")

    def _warn_of_other_versions(self, about: Mapping[str, object]) -> None:
        others = set()
        for path in self.folder.parent.glob("*/study.json"):
            try:
                stated = json.loads(path.read_text())
                version = f"resnet_paths {stated['resnet_paths']} with torch {stated['torch']}"
            except (OSError, ValueError, KeyError, TypeError):
                version = f"unknown ({path.parent.name})"
            others.add(version)
        others.discard(f"resnet_paths {about['resnet_paths']} with torch {about['torch']}")
        if others:
            warnings.warn(
                f"store {self.folder.parent}: results of {', '.join(sorted(others))} are stored there too; not used",
                stacklevel=4,
            )


def _checksum(names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> str:
    return fingerprint(list(names), sorted(tensors.items()))


def _read_part(path: Path) -> tuple[list[str], BatchResult]:
    metadata, tensors = read_metadata(path), read_tensors(path)
    names = metadata["lesions"]
    if metadata["checksum"] != _checksum(names, tensors):
        raise ResnetPathsError("store", str(path), "a part as it was written")
    sums = {}
    for name, (dtype, shape) in metadata["forms"].items():
        sums[name] = np.frombuffer(zlib.decompress(tensors[name].numpy().tobytes()), dtype).reshape(shape)
    if not sums or any(len(values) != len(names) for values in sums.values()):
        raise ResnetPathsError("store", str(path), "a part with as many rows as lesions")
    return names, BatchResult(sums)

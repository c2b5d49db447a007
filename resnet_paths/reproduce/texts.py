"""Text for language models: the sources of Python's documentation, whose held-out documents are included.

A document is held out if the first four bytes of the SHA-256 of its name, modulo 40, are 35. Whole documents are held
out, since parts of one document resemble each other.
"""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

import torch
from torch.utils.data import Dataset

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import cache_folder, check_sha256, shipped_folder
from resnet_paths.zoo.tokens import BytePairTokenizer

__all__ = ["TEXTS", "TextDataset", "is_held_out", "load_text", "read_merges"]

TEXTS = ("python-docs",)
"""Data sets of text by name."""

_SHA256 = {
    "merges.txt": "80d6476e31cc6b363133b13193c13227a233e0d7859f7805991e6781b59db9b1",
    "held_out.txt.xz": "10d677bc946f63fcd92eed36e570893a49b35e667a76bfb5e152c201ff97b2b1",
}
_DEBIAN_PYTHON_DOCS = Path("/usr/share/doc/python3.11/html/_sources")
_SEPARATOR = b"\0"


class TextDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows of a text; item `i` is (tokens [context], the token that follows each of them [context]), both int64.

    Windows do not overlap. Tokens after the last full window are not used.

    Args:
        name: Name of the data set.
        documents: Documents as bytes. They are joined by a zero byte.
        tokenizer: The tokenizer.
        context: Tokens per window.
        windows_per_epoch: Number of windows that training draws in an epoch, at random places of the text.

    Raises:
        ResnetPathsError: If the text is shorter than a window, or a document contains a zero byte.
    """

    def __init__(
        self,
        name: str,
        documents: list[bytes],
        tokenizer: BytePairTokenizer,
        *,
        context: int = 128,
        windows_per_epoch: int = 4096,
    ) -> None:
        if any(_SEPARATOR in document for document in documents):
            raise ResnetPathsError("documents", "a document with a zero byte", "text", "A zero byte ends a document.")
        self.name = name
        self.tokenizer = tokenizer
        self.context = context
        self.windows_per_epoch = windows_per_epoch
        self.text = tokenizer.encode(_SEPARATOR.join(documents))
        if len(self.text) <= context:
            raise ResnetPathsError("documents", f"{len(self.text)} tokens", f"more than {context} tokens, one window")

    def __len__(self) -> int:
        """Number of windows."""
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of window `index` and the token that follows each, both int64 [context]."""
        start = range(len(self))[index] * self.context
        inputs, targets = self.windows(torch.tensor([start]))
        return inputs[0], targets[0]

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes of the tokens to predict, over all windows."""
        lengths = torch.tensor([len(content) for content in self.tokenizer.token_bytes])
        return lengths[self.text[1 : 1 + len(self) * self.context]].double().mean().item()

    def windows(self, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows that start at positions of the text [batch]: inputs and targets, both int64 [batch, context]."""
        tokens = self.text[starts[:, None] + torch.arange(self.context + 1)]
        return tokens[:, :-1], tokens[:, 1:]


def is_held_out(name: str) -> bool:
    """Whether a document is held out of training, from the hash of its name.

    Args:
        name: Path below the folder of the documents, with forward slashes.

    Returns:
        True for one of 40 documents, on average.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 40 == 35


def load_text(name: str, split: str, folder: Path | None) -> TextDataset:
    """Load a split of a data set of text; see `resnet_paths.load_dataset`.

    Args:
        name: One of `TEXTS`.
        split: ``"train"`` or ``"test"``.
        folder: Folder of documents (``*.txt``, with folders inside); None for the installed documentation, or for the
            held-out documents that are included.

    Returns:
        The data set.

    Raises:
        ResnetPathsError: If there are no documents, or a file is missing or corrupt.
    """
    shipped = shipped_folder("data") / name
    check_sha256(shipped / "merges.txt", _SHA256["merges.txt"])
    tokenizer = BytePairTokenizer(read_merges(shipped / "merges.txt"))
    if split == "test" and folder is None:
        check_sha256(shipped / "held_out.txt.xz", _SHA256["held_out.txt.xz"])
        documents = lzma.decompress((shipped / "held_out.txt.xz").read_bytes()).split(_SEPARATOR)
    else:
        documents = _read_documents(_installed(name) if folder is None else folder, split)
    return TextDataset(name, documents, tokenizer)


def read_merges(path: Path) -> list[tuple[int, int]]:
    """Merges of a tokenizer from a file, two tokens per line."""
    pairs = [line.split() for line in path.read_text().splitlines()]
    return [(int(left), int(right)) for left, right in pairs]


def _installed(name: str) -> Path:
    cache = cache_folder() / name
    return cache if cache.is_dir() else _DEBIAN_PYTHON_DOCS


def _read_documents(folder: Path, split: str) -> list[bytes]:
    """Documents of a split, in the order of their names."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    chosen = [name for name in names if is_held_out(name) == (split == "test")]
    if not chosen:
        raise ResnetPathsError(
            "folder",
            str(folder),
            f"a folder with text files (*.txt) of the split {split!r}",
            "Install the package python3.11-doc, or pass the folder of the sources of Python's documentation.",
        )
    return [(folder / name).read_bytes() for name in chosen]

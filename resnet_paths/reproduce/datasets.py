"""Data sets by name: labelled images, normalised as the shipped networks expect, and text.

Use `load_dataset`; `resnet_paths.reproduce.texts` reads text. Images are stored as bytes and converted to float32 one
at a time, so that the training split takes 47 MB (Fashion-MNIST) or 154 MB (CIFAR-10). The files are read here and not
by torchvision, which is an optional dependency and reads CIFAR-10 from pickles only.
"""

from __future__ import annotations

import gzip
import http.client
import math
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from resnet_paths._utils.arguments import require_path
from resnet_paths._utils.errors import ResnetPathsError, nearest_names, requires_extra
from resnet_paths._utils.files import cache_folder, check_sha256, shipped_folder, write_then_rename
from resnet_paths.reproduce.texts import TEXTS, TextDataset, load_text

__all__ = ["DATASETS", "ImageDataset", "load_dataset"]

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "sample-images-idx3-ubyte.gz": "50597dcfdad7dd41ff807c354c23f5fa88f740a5cff43df182ba73c229564ef1",
    "sample-labels-idx1-ubyte.gz": "15935be4ed7b45db8c8b1f946b8c6398b9538c1ef9948019db4da1f2d4a5ca3d",
}
_DIGITS_SHA256 = {
    "train-images-idx3-ubyte.gz": "98bcae92946accd99dd4c0d00bb410d95a23339420e9421cf9ac02aaccdcfb35",
    "train-labels-idx1-ubyte.gz": "6975273f78e84060d44aaf12a803dc4ddae14f05fcd2f3b1b14797eae575e85f",
    "test-images-idx3-ubyte.gz": "856e5069fbb4edd2fdb52f92d3f441b708e8d51d7306204a7108fedf546bd1f8",
    "test-labels-idx1-ubyte.gz": "589b979c70225f8b27f77ef850c12028b3c60d4afa28cb91b170ac0a9388bb34",
}
_CIFAR_10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR_10_RECORD = 1 + 3 * 32 * 32  # one label byte, then the red, green and blue planes


@dataclass(frozen=True)
class DatasetFacts:
    """Title, shape, normalisation, classes and augmentation of a data set.

    Attributes:
        title: Its name in text and tables.
        shape: Channels, height and width of an image.
        mean: Mean of the pixels in [0, 1] of each channel.
        std: Their standard deviation.
        classes: Names of the classes.
        crop_padding: Pixels by which training images are padded before they are cropped, by default.
        flips: Whether training images are flipped at random.
    """

    title: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    crop_padding: int = 2
    flips: bool = True


DATASETS = {
    "fashion-mnist": DatasetFacts(
        title="Fashion-MNIST",
        shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        classes=(
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
    ),
    "digits": DatasetFacts(
        title="digits",
        shape=(1, 8, 8),
        mean=(0.3059,),
        std=(0.3754,),
        classes=tuple("0123456789"),
        crop_padding=1,
        flips=False,
    ),
    "cifar-10": DatasetFacts(
        title="CIFAR-10",
        shape=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        classes=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
    ),
}
"""Facts by name."""


class ImageDataset(Dataset[tuple[torch.Tensor, int]]):
    """Images with integer labels; item `i` is (normalised float32 [C, H, W], int).

    Args:
        name: Key of `DATASETS`.
        images: uint8, [N, C, H, W], at least one.
        labels: integers in [0, number of classes), [N].

    Raises:
        ResnetPathsError: If the name is unknown, or shapes, dtypes or labels are invalid.
    """

    def __init__(self, name: str, images: torch.Tensor, labels: torch.Tensor) -> None:
        if not isinstance(name, str) or name not in DATASETS:
            raise ResnetPathsError("name", name, f"one of {nearest_names(str(name), DATASETS, cutoff=0)}")
        facts = DATASETS[name]
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != facts.shape or not len(images):
            raise ResnetPathsError(
                "images",
                f"{images.dtype} {list(images.shape)}",
                f"torch.uint8 [N, {', '.join(map(str, facts.shape))}] with N of at least 1 for {name}",
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ResnetPathsError("labels", str(labels.dtype), "integers")
        if labels.shape != images.shape[:1]:
            raise ResnetPathsError("labels", list(labels.shape), f"[{len(images)}], one per image")
        outside = (labels < 0) | (labels >= len(facts.classes))
        if bool(outside.any()):
            raise ResnetPathsError("labels", int(labels[outside][0]), f"0 to {len(facts.classes) - 1}")
        self.name = name
        self.classes = facts.classes
        self.images = images
        self.labels: list[int] = labels.tolist()
        self._mean = torch.tensor(facts.mean).view(-1, 1, 1)
        self._std = torch.tensor(facts.std).view(-1, 1, 1)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image `index` as float32 [C, H, W], normalised, and its label."""
        return self.normalise(self.images[index]), self.labels[index]

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Convert bytes [..., C, H, W] to float32 with about zero mean and unit variance per channel."""
        return images.to(torch.float32).div_(255.0).sub_(self._mean).div_(self._std)


@overload
def load_dataset(
    name: Literal["fashion-mnist", "digits", "cifar-10"] = ...,
    split: str = ...,
    folder: str | Path | None = ...,
    download: bool = ...,
) -> ImageDataset: ...


@overload
def load_dataset(
    name: Literal["python-docs"], split: str = ..., folder: str | Path | None = ..., download: bool = ...
) -> TextDataset: ...


@overload
def load_dataset(
    name: str, split: str = ..., folder: str | Path | None = ..., download: bool = ...
) -> ImageDataset | TextDataset: ...


def load_dataset(
    name: str = "fashion-mnist",
    split: str = "test",
    folder: str | Path | None = None,
    download: bool = True,
) -> ImageDataset | TextDataset:
    """Load a split of a data set from disk, or download it once.

    Digits are included. The test split of Fashion-MNIST is included in a clone of the project and in the distribution
    ``resnet-paths-data``, its sample in every installation. Both splits are read from Debian's package
    ``dataset-fashion-mnist`` if that is installed. Everything else is downloaded by torchvision (extra ``[train]``),
    verified, and stored in the cache folder (``$RESNET_PATHS_CACHE`` or ``~/.cache/resnet_paths``). CIFAR-10 is read
    in its binary form, since the Python form is a pickle, which can run code when it is read. The held-out documents
    of Python's documentation are included; the others are read from Debian's package ``python3.11-doc``, or from the
    folder ``python-docs`` of the cache folder.

    Args:
        name: ``"fashion-mnist"`` (60,000 + 10,000 grey 28x28 images; Xiao, Rasul, Vollgraf 2017), ``"digits"``
            (1,297 + 500 grey 8x8 images, the first and the last of scikit-learn's; Alpaydin, Kaynak 1998),
            ``"cifar-10"`` (50,000 + 10,000 colour 32x32 images; Krizhevsky 2009) or ``"python-docs"`` (text: the
            sources of the documentation of Python 3.11, 479 + 18 documents, 10.8 + 0.2 MB).
        split: ``"train"``, ``"test"``, or ``"sample"``, the first 500 test images of Fashion-MNIST.
        folder: Folder to read from and to download to, instead of those above: it contains the four ``*.gz`` files of
            Fashion-MNIST or digits, the folder ``cifar-10-batches-bin`` of CIFAR-10, or text files (``*.txt``). Text is
            not downloaded.
        download: Whether to download a missing split.

    Returns:
        A torch `Dataset` of (float32 tensor [C, H, W], normalised as the shipped networks expect; int label), or for
        text of (tokens [context], the token that follows each [context]), both int64, with the attribute ``tokenizer``.

    Raises:
        ResnetPathsError: If the name or split is unknown, or a file is missing, corrupt or truncated.

    Example:
        >>> images = load_dataset("fashion-mnist", split="test")
        >>> image, label = images[0]
        >>> len(images), tuple(image.shape), images.classes[label]
        (10000, (1, 28, 28), 'ankle boot')
    """
    known = [*DATASETS, *TEXTS]
    if not isinstance(name, str) or name not in known:
        raise ResnetPathsError("name", name, f"one of {nearest_names(str(name), known, len(known), cutoff=0)}")
    splits = ("train", "test", "sample") if name == "fashion-mnist" else ("train", "test")
    if split not in splits:
        raise ResnetPathsError("split", split, f"one of {', '.join(map(repr, splits))} for {name}")
    root = None if folder is None else require_path("folder", folder).expanduser()
    if name in TEXTS:
        return load_text(name, split, root)
    if name == "fashion-mnist":
        images, labels = _read_fashion_mnist(split, root, download)
    elif name == "digits":
        images, labels = _read_digits(split, root)
    else:
        images, labels = _read_cifar_10(split, root, download)
    return ImageDataset(name, images, labels)


def _read_fashion_mnist(split: str, folder: Path | None, download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    stem = "t10k" if split == "test" else split
    names = (f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz")
    cache = folder or cache_folder() / "fashion-mnist"
    shipped = shipped_folder("data") / "fashion-mnist"
    candidates = (shipped, _DEBIAN_FASHION_MNIST, cache) if folder is None else (folder,)
    found = next((p for p in candidates if all((p / n).is_file() for n in names)), None)
    if found is None and download and split != "sample":
        _download_fashion_mnist(cache, names)
        found = cache
    if found is None:
        raise ResnetPathsError(
            "data file",
            str(candidates[0] / names[0]),
            "an existing file",
            "Restore it from the repository, install resnet-paths-data or Debian's dataset-fashion-mnist, or pass "
            "download=True.",
        )
    advice = {
        _DEBIAN_FASHION_MNIST: "Reinstall the package dataset-fashion-mnist.",
        cache: "Delete it to download it again.",
    }.get(found, "Restore it from the repository.")
    return _read_idx_pair(found, names, _FASHION_MNIST_SHA256, advice)


def _read_digits(split: str, folder: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    names = (f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz")
    return _read_idx_pair(folder or shipped_folder("data") / "digits", names, _DIGITS_SHA256)


def _read_idx_pair(
    folder: Path, names: tuple[str, str], sha256: Mapping[str, str], advice: str = "Restore it from the repository."
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 1, H, W] and labels [N] of two files whose checksums are verified."""
    for name in names:
        check_sha256(folder / name, sha256[name], advice)
    return read_idx(folder / names[0]).unsqueeze(1), read_idx(folder / names[1]).long()


def _download_fashion_mnist(folder: Path, names: Sequence[str]) -> None:
    with requires_extra("train"):
        from torchvision.datasets import FashionMNIST
        from torchvision.datasets.utils import download_url

    def download(unfinished: Path) -> None:
        for name in missing:
            download_url(FashionMNIST.mirrors[0] + name, unfinished)
            check_sha256(unfinished / name, _FASHION_MNIST_SHA256[name], "Try again.")

    missing = [name for name in names if not (folder / name).is_file()]
    _download_then_move(download, folder, missing, "fashion-mnist")


def _download_then_move(download: Callable[[Path], None], folder: Path, files: Sequence[str], name: str) -> None:
    """Call `download` with a temporary folder inside `folder`, then move the downloaded `files` to `folder`.

    Files in `folder` are always complete, also after a failed download.

    Raises:
        ResnetPathsError: If the download fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
            download(Path(unfinished))
            for file in files:
                with write_then_rename(folder / file) as temporary:
                    shutil.copyfile(Path(unfinished) / file, temporary)
    except (OSError, EOFError, RuntimeError, http.client.HTTPException, tarfile.TarError, zlib.error) as error:
        raise ResnetPathsError(
            f"download of {name}",
            str(error),
            "a reachable server and an intact file",
            "Try again, or download the files manually and pass their folder.",
        ) from error


def read_idx(path: Path) -> torch.Tensor:
    """Read a gzip-compressed IDX file of bytes (the format of MNIST; LeCun, Cortes, Burges 1998).

    Args:
        path: The ``.gz`` file.

    Returns:
        uint8 tensor with the shape of the header.

    Raises:
        ResnetPathsError: If the file is not a gzip file, not an IDX file of unsigned bytes, or has another size than
            the header states.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ResnetPathsError(f"data file {path}", str(error), "a complete gzip file") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ResnetPathsError(f"data file {path}", content[:4], "an IDX file of unsigned bytes")
    dims = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=dims, offset=4).tolist()
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims)
    if values.size != math.prod(shape):
        raise ResnetPathsError(
            f"data file {path}", f"{values.size} bytes", f"{math.prod(shape)} bytes, as stated in its header"
        )
    return torch.from_numpy(values.reshape(shape).copy())


def _read_cifar_10(split: str, folder: Path | None, download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    root = folder or cache_folder() / "cifar-10"
    batches = root / "cifar-10-batches-bin"
    numbers = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    if download and not all((batches / n).is_file() for n in numbers):
        _download_cifar_10(root)
    records = torch.cat([_read_cifar_batch(batches / n) for n in numbers])
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long()


def _download_cifar_10(root: Path) -> None:
    with requires_extra("train"):
        from torchvision.datasets.utils import download_and_extract_archive

    def download(unfinished: Path) -> None:
        # The archive is kept in root; torchvision verifies its MD5 before it is used again.
        download_and_extract_archive(_CIFAR_10_URL, root, unfinished, md5=_CIFAR_10_MD5)

    numbers = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = [f"cifar-10-batches-bin/{number}.bin" for number in numbers]
    missing = [file for file in files if not (root / file).is_file()]
    _download_then_move(download, root, missing, "cifar-10")


def _read_cifar_batch(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise ResnetPathsError("data file", str(path), "an existing file", "Pass download=True.")
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % _CIFAR_10_RECORD:
        raise ResnetPathsError(
            f"data file {path}",
            f"{content.size} bytes",
            f"a positive multiple of {_CIFAR_10_RECORD} bytes",
            "The file is truncated: delete it and download it again.",
        )
    return torch.from_numpy(content.reshape(-1, _CIFAR_10_RECORD))

"""Data sets are read exactly as their formats say; missing, corrupt or truncated files raise an error."""

import gzip
import hashlib
import http.client
import shutil
import struct
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from torch.utils.data import DataLoader

import resnet_paths
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import shipped_folder
from resnet_paths.reproduce import datasets
from resnet_paths.reproduce.datasets import DATASETS, ImageDataset, load_dataset, read_idx

TRAIN_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
TEST_FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
CIFAR_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def idx_bytes(array):
    """The IDX format by hand: two zero bytes, type 8, number of dimensions, sizes as big-endian words, values."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", size) for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_fashion_mnist(monkeypatch):
    """Write a training or test split of a few images to a folder and make its checksums the expected ones."""

    def write(folder, names=TRAIN_FILES, num_images=7, labels=None):
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        images = rng.integers(256, size=(num_images, 28, 28))
        labels = rng.integers(10, size=num_images) if labels is None else np.asarray(labels)
        for name, array in zip(names, (images, labels), strict=True):
            content = gzip.compress(idx_bytes(array))
            (folder / name).write_bytes(content)
            monkeypatch.setitem(datasets._FASHION_MNIST_SHA256, name, hashlib.sha256(content).hexdigest())
        return images, labels

    return write


@pytest.fixture
def places(monkeypatch, tmp_path):
    """An empty cache and an empty Debian folder, both in tmp_path."""
    monkeypatch.setenv("RESNET_PATHS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "_DEBIAN_FASHION_MNIST", tmp_path / "debian")
    return tmp_path


# The shipped test split of Fashion-MNIST


@pytest.fixture(scope="module")
def shipped():
    return load_dataset("fashion-mnist", "test", download=False)


def test_shipped_split_is_the_default_and_public():
    images = resnet_paths.load_dataset()
    assert (images.name, len(images)) == ("fashion-mnist", 10_000)
    assert images.classes == DATASETS["fashion-mnist"].classes
    assert len(set(images.classes)) == 10


def test_shipped_items_are_the_files_bytes_normalised(shipped):
    folder = shipped_folder("data") / "fashion-mnist"
    pixels = gzip.decompress((folder / TEST_FILES[0]).read_bytes())[16:]
    labels = gzip.decompress((folder / TEST_FILES[1]).read_bytes())[8:]
    assert len(shipped) == len(labels) == len(pixels) // 784 == 10_000
    for index in (0, 1, 4321, 9_999, -1):
        image, label = shipped[index]
        assert image.dtype == torch.float32
        assert image.shape == (1, 28, 28)
        assert type(label) is int
        assert label == labels[index]
        start = 784 * (index % 10_000)
        expected = (np.frombuffer(pixels[start : start + 784], np.uint8) / 255 - 0.2860) / 0.3530
        np.testing.assert_allclose(image.numpy().ravel(), expected, rtol=0, atol=1e-6)


def test_shipped_labels_are_balanced(shipped):
    assert np.bincount(shipped.labels).tolist() == [1_000] * 10


def test_normalised_images_have_about_zero_mean_and_unit_variance(shipped):
    everything = shipped.normalise(shipped.images).double()
    assert abs(everything.mean().item()) < 0.01
    assert abs(everything.std().item() - 1) < 0.01


def test_an_item_does_not_share_memory_with_the_data_set(shipped):
    before = shipped.images[3].clone()
    shipped[3][0].zero_()
    assert torch.equal(shipped.images[3], before)


def test_past_the_end_is_an_index_error(shipped):
    with pytest.raises(IndexError):
        shipped[10_000]


def test_default_collation_of_a_data_loader(shipped):
    loader = DataLoader(shipped, batch_size=16)
    images, labels = next(iter(loader))
    assert images.shape == (16, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.tolist() == shipped.labels[:16]
    assert torch.equal(images[5], shipped[5][0])


def test_stated_mean_and_deviation_are_those_of_a_training_split():
    folder = datasets._DEBIAN_FASHION_MNIST
    if not all((folder / name).is_file() for name in TRAIN_FILES):
        pytest.skip("the package dataset-fashion-mnist is not installed")
    train_split = load_dataset("fashion-mnist", "train", download=False)
    counts = torch.bincount(train_split.images.flatten(), minlength=256).double()
    values = torch.arange(256) / 255
    mean = (counts * values).sum() / counts.sum()
    std = ((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt()
    assert len(train_split) == 60_000
    assert round(mean.item(), 4) == DATASETS["fashion-mnist"].mean[0]
    assert round(std.item(), 4) == DATASETS["fashion-mnist"].std[0]


# Fashion-MNIST from other places


def test_debian_folder_holds_the_training_split(places, small_fashion_mnist):
    images, labels = small_fashion_mnist(places / "debian")
    found = load_dataset("fashion-mnist", "train", download=False)
    assert np.array_equal(found.images[:, 0].numpy(), images)
    assert found.labels == labels.tolist()


def test_debian_folder_comes_before_the_cache(places, small_fashion_mnist):
    small_fashion_mnist(places / "cache" / "fashion-mnist", num_images=3)
    assert len(load_dataset("fashion-mnist", "train")) == 3
    small_fashion_mnist(places / "debian", num_images=4)
    assert len(load_dataset("fashion-mnist", "train")) == 4


@pytest.mark.parametrize(("split", "names"), [("train", TRAIN_FILES), ("test", TEST_FILES)])
def test_a_folder_of_ones_own_holds_either_split(tmp_path, small_fashion_mnist, split, names):
    small_fashion_mnist(tmp_path / "mine", names)
    assert len(load_dataset("fashion-mnist", split, folder=str(tmp_path / "mine"), download=False)) == 7


def test_a_folder_may_start_with_a_tilde(tmp_path, monkeypatch, small_fashion_mnist):
    monkeypatch.setenv("HOME", str(tmp_path))
    small_fashion_mnist(tmp_path / "mine")
    assert len(load_dataset("fashion-mnist", "train", folder="~/mine", download=False)) == 7


def test_missing_training_split_without_download(places):
    with pytest.raises(ResnetPathsError, match=r"train-images.*an existing file.*dataset-fashion-mnist.*download=True"):
        load_dataset("fashion-mnist", "train", download=False)
    assert names_in(places) == []


@pytest.mark.parametrize("which", [0, 1])
def test_corrupt_file_is_refused_with_its_path_and_what_to_do(places, small_fashion_mnist, which):
    small_fashion_mnist(places / "debian")
    path = places / "debian" / TRAIN_FILES[which]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ResnetPathsError, match=f"{TRAIN_FILES[which]}: got 'sha256 .*package dataset-fashion-mnist"):
        load_dataset("fashion-mnist", "train")


def test_corrupt_shipped_file_is_refused(tmp_path):
    shutil.copytree(shipped_folder("data") / "fashion-mnist", tmp_path / "copy")
    path = tmp_path / "copy" / TEST_FILES[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResnetPathsError, match=f"{TEST_FILES[0]}.*corrupt or incomplete"):
        load_dataset("fashion-mnist", "test", folder=tmp_path / "copy")


def test_label_out_of_range_in_a_file(places, small_fashion_mnist):
    small_fashion_mnist(places / "debian", num_images=3, labels=[0, 10, 9])
    with pytest.raises(ResnetPathsError, match="labels: got 10; allowed: 0 to 9"):
        load_dataset("fashion-mnist", "train")


def test_fewer_labels_than_images_in_the_files(places, small_fashion_mnist):
    small_fashion_mnist(places / "debian", num_images=3, labels=[0, 1])
    with pytest.raises(ResnetPathsError, match=r"labels: got \[2\]; allowed: \[3\]"):
        load_dataset("fashion-mnist", "train")


# Digits


def test_digits_are_included_in_two_splits():
    """Whole numbers from 0 to 16 in the source: 17 grey levels, in its order of images."""
    train_split, test_split = (load_dataset("digits", split) for split in ("train", "test"))
    assert (len(train_split), len(test_split)) == (1_297, 500)
    levels = {round(255 * level / 16) for level in range(17)}
    for images in (train_split, test_split):
        assert images.images.shape[1:] == (1, 8, 8)
        assert set(images.images.unique().tolist()) == levels
        assert set(images.labels) == set(range(10))
    assert train_split.labels[:10] == list(range(10))
    first = [0, 0, 5, 13, 9, 1, 0, 0]  # the first row of the first image, as printed in scikit-learn's documentation
    assert train_split.images[0, 0, 0].tolist() == [round(255 * level / 16) for level in first]


def test_stated_mean_and_deviation_are_those_of_the_training_digits():
    train_split = load_dataset("digits", "train")
    pixels = train_split.images.double() / 255
    assert round(pixels.mean().item(), 4) == DATASETS["digits"].mean[0]
    assert round(pixels.std(correction=0).item(), 4) == DATASETS["digits"].std[0]


def test_digits_of_a_folder_are_verified(tmp_path):
    shutil.copytree(shipped_folder("data") / "digits", tmp_path / "digits")
    assert load_dataset("digits", folder=tmp_path / "digits").labels == load_dataset("digits").labels
    path = tmp_path / "digits" / "test-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResnetPathsError, match=r"test-labels.*corrupt or incomplete"):
        load_dataset("digits", folder=tmp_path / "digits")
    with pytest.raises(ResnetPathsError, match=r"train-images.*an existing file"):
        load_dataset("digits", "train", folder=tmp_path)
    with pytest.raises(ResnetPathsError, match="split: got 'sample'; allowed: one of 'train', 'test' for digits"):
        load_dataset("digits", "sample")


# Arguments


@pytest.mark.parametrize(("name", "nearest"), [("fashion_mnist", "fashion-mnist"), ("cifar10", "cifar-10"), (5, "")])
def test_unknown_name_gives_the_names_nearest_first(name, nearest):
    with pytest.raises(ResnetPathsError, match=f"name: got {name!r}; allowed: one of '{nearest}") as caught:
        load_dataset(name)
    assert all(repr(known) in caught.value.allowed for known in DATASETS)


@pytest.mark.parametrize("split", ["valid", "Train", "", None])
def test_unknown_split(split):
    with pytest.raises(ResnetPathsError, match=r"split: got .*; allowed: one of 'train', 'test', 'sample'"):
        load_dataset("fashion-mnist", split)


GREY = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "images", "labels", "message"),
    [
        ("fashion", GREY, torch.tensor([0, 1]), "name: got 'fashion'; allowed: one of 'fashion-mnist'"),
        ("fashion-mnist", GREY.float(), torch.tensor([0, 1]), r"images: got 'torch.float32 \[2, 1, 28, 28\]'"),
        ("fashion-mnist", GREY[:, 0], torch.tensor([0, 1]), r"images: got 'torch.uint8 \[2, 28, 28\]'"),
        ("fashion-mnist", GREY[..., 1:], torch.tensor([0, 1]), r"allowed: torch.uint8 \[N, 1, 28, 28\]"),
        ("cifar-10", GREY, torch.tensor([0, 1]), r"allowed: torch.uint8 \[N, 3, 32, 32\]"),
        ("fashion-mnist", GREY[:0], torch.tensor([], dtype=torch.long), "N of at least 1"),
        ("fashion-mnist", GREY, torch.tensor([0]), r"labels: got \[1\]; allowed: \[2\]"),
        ("fashion-mnist", GREY, torch.tensor([[0], [1]]), r"labels: got \[2, 1\]; allowed: \[2\]"),
        ("fashion-mnist", GREY, torch.tensor([0, 10]), "labels: got 10; allowed: 0 to 9"),
        ("fashion-mnist", GREY, torch.tensor([-1, 0]), "labels: got -1; allowed: 0 to 9"),
        ("fashion-mnist", GREY, torch.tensor([0.0, 1.0]), "labels: got 'torch.float32'; allowed: integers"),
    ],
)
def test_images_and_labels_that_do_not_fit(name, images, labels, message):
    with pytest.raises(ResnetPathsError, match=message):
        ImageDataset(name, images, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_are_python_ints_whatever_their_dtype(dtype):
    images = ImageDataset("fashion-mnist", GREY, torch.tensor([9, 0], dtype=dtype))
    assert images.labels == [9, 0]
    assert type(images[0][1]) is int


# The IDX format


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (0, 3)])
def test_read_idx_gives_back_what_was_written(tmp_path, shape):
    array = np.random.default_rng(1).integers(256, size=shape)
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx_bytes(array)))
    found = read_idx(tmp_path / "x.gz")
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), array)
    found += 1  # its own, writable memory


WHOLE = idx_bytes(np.arange(24).reshape(2, 3, 4))
ZIPPED = gzip.compress(WHOLE, mtime=0)
GZIP, IDX, SIZE = "a complete gzip file", "an IDX file of unsigned bytes", "bytes, as stated in its header"


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        pytest.param(ZIPPED[:-1], GZIP, id="one byte cut"),
        pytest.param(ZIPPED[:15], GZIP, id="cut at the start"),
        pytest.param(ZIPPED[:-8] + b"\0" * 8, GZIP, id="wrong checksum inside"),
        pytest.param(ZIPPED[:12] + b"\xff" * 40, GZIP, id="no deflate stream"),
        pytest.param(WHOLE, GZIP, id="not compressed"),
        pytest.param(b"", IDX, id="empty"),
        pytest.param(gzip.compress(b""), IDX, id="empty inside"),
        pytest.param(gzip.compress(b"\0\0\x0d" + WHOLE[3:]), IDX, id="of floats"),
        pytest.param(gzip.compress(b"\1\0\x08" + WHOLE[3:]), IDX, id="wrong first byte"),
        pytest.param(gzip.compress(WHOLE[:9]), IDX, id="header cut"),
        pytest.param(gzip.compress(WHOLE[:-1]), f"24 {SIZE}", id="a value less"),
        pytest.param(gzip.compress(WHOLE + b"\0"), f"24 {SIZE}", id="a value more"),
        pytest.param(gzip.compress(WHOLE[:4] + b"\xff" * 8 + WHOLE[12:]), SIZE, id="sizes near 2^32"),
    ],
)
def test_read_idx_refuses_what_is_cut_or_of_another_format(tmp_path, content, allowed):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ResnetPathsError) as caught:
        read_idx(tmp_path / "x.gz")
    assert str(tmp_path / "x.gz") in str(caught.value)
    assert caught.value.allowed.endswith(allowed)


def test_read_idx_of_no_file(tmp_path):
    with pytest.raises(ResnetPathsError, match=r"absent\.gz"):
        read_idx(tmp_path / "absent.gz")


# Fashion-MNIST by download


def fake_download_url(monkeypatch, server, calls):
    """Serve files from a folder in place of torchvision's download; an existing file is kept, as torchvision does."""

    def download_url(url, root, filename=None, md5=None):
        calls.append(url)
        target = root / url.rsplit("/", 1)[1]
        if not target.exists():
            shutil.copyfile(server / target.name, target)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)


def test_training_split_is_downloaded_once(places, small_fashion_mnist, monkeypatch):
    small_fashion_mnist(places / "server")
    calls = []
    fake_download_url(monkeypatch, places / "server", calls)
    first = load_dataset("fashion-mnist", "train")
    mirror = torchvision.datasets.FashionMNIST.mirrors[0]
    assert calls == [mirror + name for name in TRAIN_FILES]
    assert names_in(places / "cache") == ["fashion-mnist", *(f"fashion-mnist/{name}" for name in TRAIN_FILES)]
    again = load_dataset("fashion-mnist", "train")
    assert len(calls) == 2
    assert torch.equal(first.images, again.images)


def test_only_the_missing_file_is_downloaded(places, small_fashion_mnist, monkeypatch):
    small_fashion_mnist(places / "server")
    (places / "mine").mkdir()
    shutil.copyfile(places / "server" / TRAIN_FILES[0], places / "mine" / TRAIN_FILES[0])
    calls = []
    fake_download_url(monkeypatch, places / "server", calls)
    assert len(load_dataset("fashion-mnist", "train", folder=places / "mine")) == 7
    assert [url.rsplit("/", 1)[1] for url in calls] == [TRAIN_FILES[1]]


def test_a_wheel_without_the_test_split_downloads_it_once(places, monkeypatch):
    server = shipped_folder("data") / "fashion-mnist"
    monkeypatch.setattr(datasets, "shipped_folder", lambda name: places / "wheel")
    with pytest.raises(ResnetPathsError, match="Restore it from the repository, install resnet-paths-data"):
        load_dataset("fashion-mnist", "test", download=False)
    fake_download_url(monkeypatch, server, calls := [])
    for _ in range(2):
        assert len(load_dataset("fashion-mnist", "test")) == 10_000
    assert [url.rsplit("/", 1)[1] for url in calls] == list(TEST_FILES)


def test_the_sample_is_the_start_of_the_test_split_and_never_downloaded(shipped, places, monkeypatch):
    sample = load_dataset("fashion-mnist", "sample", download=False)
    assert torch.equal(sample.images, shipped.images[:500])
    assert sample.labels == shipped.labels[:500]
    monkeypatch.setattr(datasets, "shipped_folder", lambda name: places)
    fake_download_url(monkeypatch, places, calls := [])
    with pytest.raises(ResnetPathsError, match="Restore it from the repository"):
        load_dataset("fashion-mnist", "sample")
    assert calls == []
    with pytest.raises(ResnetPathsError, match=r"split: got 'sample'; allowed: one of 'train', 'test' for cifar-10"):
        load_dataset("cifar-10", "sample")


@pytest.mark.parametrize("wrong", [b"", b"<html>not found</html>", None])
def test_download_of_wrong_bytes_is_refused_and_tried_again_next_time(places, small_fashion_mnist, monkeypatch, wrong):
    small_fashion_mnist(places / "server")
    right = (places / "server" / TRAIN_FILES[1]).read_bytes()
    (places / "server" / TRAIN_FILES[1]).write_bytes(right[:-5] if wrong is None else wrong)
    fake_download_url(monkeypatch, places / "server", calls := [])
    with pytest.raises(ResnetPathsError, match=f"{TRAIN_FILES[1]}.*sha256"):
        load_dataset("fashion-mnist", "train")
    assert names_in(places / "cache") == ["fashion-mnist"]
    (places / "server" / TRAIN_FILES[1]).write_bytes(right)
    assert len(load_dataset("fashion-mnist", "train")) == 7
    assert len(calls) == 4


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        TimeoutError("slow"),
        http.client.IncompleteRead(b"part"),
        RuntimeError("File not found or corrupted."),
    ],
)
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar-10"])
def test_failing_download_is_one_error_and_leaves_nothing_that_looks_finished(places, monkeypatch, name, error):
    def fail(url, root, *args, **kwargs):
        (Path(root) / url.rsplit("/", 1)[1]).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fail)
    with pytest.raises(ResnetPathsError, match=f"download of {name}: got .*; allowed: a reachable server") as caught:
        load_dataset(name, "train")
    assert caught.value.__cause__ is error
    left = [path for path in (places / "cache").rglob("*") if path.is_file()]
    # Torchvision itself holds an archive that it finds against the MD5.
    assert [path.name for path in left] == (["cifar-10-binary.tar.gz"] if name == "cifar-10" else [])


def test_interrupted_download_leaves_nothing_that_looks_finished(places, monkeypatch):
    def interrupt(url, root, **kwargs):
        (root / url.rsplit("/", 1)[1]).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("fashion-mnist", "train")
    assert names_in(places / "cache") == ["fashion-mnist"]


def test_without_a_network_the_error_says_so(places):
    with pytest.raises(ResnetPathsError, match=r"download of fashion-mnist.*no network.*Try again"):
        load_dataset("fashion-mnist", "train")


# CIFAR-10


def cifar_pixel(image, channel, row, column):
    return (37 * image + 101 * channel + 7 * row + 3 * column) % 256


def write_cifar(folder, first=0, counts=(2, 1, 3, 1, 2, 4)):
    """Small files in CIFAR-10's binary format: a label byte, then the red, green and blue planes row by row."""
    folder.mkdir(parents=True)
    number = first
    for name, count in zip(CIFAR_FILES, counts, strict=True):
        content = bytearray()
        for _ in range(count):
            content.append(number % 10)
            for channel in range(3):
                content += bytes(cifar_pixel(number, channel, y, x) for y in range(32) for x in range(32))
            number += 1
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(("split", "numbers"), [("train", range(9)), ("test", range(9, 13))])
def test_cifar_10_is_read_pixel_by_pixel(tmp_path, split, numbers):
    write_cifar(tmp_path / "cifar-10-batches-bin")
    images = load_dataset("cifar-10", split, folder=tmp_path, download=False)
    assert images.labels == [number % 10 for number in numbers]
    expected = [[[[cifar_pixel(n, c, y, x) for x in range(32)] for y in range(32)] for c in range(3)] for n in numbers]
    assert images.images.tolist() == expected
    image, label = images[0]
    assert image.dtype == torch.float32
    assert images.classes[label] == ("airplane" if split == "train" else "truck")
    means, stds = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    for channel, row, column in ((0, 0, 0), (1, 5, 31), (2, 31, 7)):
        pixel = (cifar_pixel(numbers[0], channel, row, column) / 255 - means[channel]) / stds[channel]
        assert image[channel, row, column].item() == pytest.approx(pixel, abs=1e-6)


def test_cifar_10_works_with_default_collation(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-bin")
    images, labels = next(iter(DataLoader(load_dataset("cifar-10", "test", folder=tmp_path), batch_size=3)))
    assert images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [9, 0, 1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_10_missing_without_download(places, split):
    with pytest.raises(ResnetPathsError, match=r"batch.*an existing file.*download=True"):
        load_dataset("cifar-10", split, download=False)
    assert names_in(places) == []


@pytest.mark.parametrize("file", ["data_batch_1.bin", "data_batch_5.bin", "test_batch.bin"])
@pytest.mark.parametrize("kept", [0, 1, 3072, -1])
def test_cifar_10_cut_short(tmp_path, file, kept):
    write_cifar(tmp_path / "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-batches-bin" / file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ResnetPathsError, match=f"{file}: got '.* bytes'; allowed: a .*multiple of 3073.*truncated"):
        load_dataset("cifar-10", "test" if "test" in file else "train", folder=tmp_path)


def test_cifar_10_with_a_wrong_label(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(ResnetPathsError, match="labels: got 10; allowed: 0 to 9"):
        load_dataset("cifar-10", "test", folder=tmp_path)


@pytest.fixture
def cifar_server(monkeypatch, tmp_path):
    """A small archive in the real one's layout that stands in for the download; its extraction is torchvision's own."""
    write_cifar(tmp_path / "server" / "cifar-10-batches-bin")
    (tmp_path / "server" / "cifar-10-batches-bin" / "readme.html").write_text("see the web page")
    archive = tmp_path / "server" / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(archive.parent / "cifar-10-batches-bin", "cifar-10-batches-bin")
    monkeypatch.setattr(datasets, "_CIFAR_10_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    calls = []

    def urlretrieve(url, filename, *args, **kwargs):
        calls.append(url)
        shutil.copyfile(archive, filename)

    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, **kwargs: url)
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", urlretrieve)
    return calls


def test_cifar_10_download_asks_for_the_authors_archive_and_md5(places, monkeypatch):
    calls = []

    def download(url, download_root, extract_root=None, filename=None, md5=None, remove_finished=False):
        calls.append((url, md5))
        write_cifar(extract_root / "cifar-10-batches-bin")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", download)
    assert len(load_dataset("cifar-10", "test")) == 4
    assert calls == [("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")]


def test_cifar_10_is_downloaded_once_for_both_splits(places, cifar_server):
    assert load_dataset("cifar-10", "train").labels == list(range(9))
    assert load_dataset("cifar-10", "test").labels == [9, 0, 1, 2]
    assert len(cifar_server) == 1
    root = places / "cache" / "cifar-10"
    wanted = sorted(["cifar-10-binary.tar.gz", *(f"cifar-10-batches-bin/{name}" for name in CIFAR_FILES)])
    assert [name for name in names_in(root) if name != "cifar-10-batches-bin"] == wanted


@pytest.mark.parametrize("moment", range(6))
def test_cifar_10_extraction_that_stops_is_not_taken_for_finished(places, cifar_server, monkeypatch, moment):
    """Whichever file the disk fills at, the next call completes the set and never reads a part of a file."""
    whole_copy = shutil.copyfile

    def stop(source, target):
        if CIFAR_FILES[moment] in str(source):
            target.write_bytes(source.read_bytes()[:3073])  # cut between two images: no size check would see it
            raise OSError("disk full")
        return whole_copy(source, target)

    monkeypatch.setattr(datasets.shutil, "copyfile", stop)
    with pytest.raises(ResnetPathsError, match=r"download of cifar-10.*disk full"):
        load_dataset("cifar-10", "train")
    monkeypatch.setattr(datasets.shutil, "copyfile", whole_copy)
    assert load_dataset("cifar-10", "train").labels == list(range(9))
    assert load_dataset("cifar-10", "test").labels == [9, 0, 1, 2]


def test_cifar_10_extraction_that_is_interrupted_leaves_no_folder(places, cifar_server, monkeypatch):
    extract = tarfile.TarFile.extractall

    def interrupt(self, path=".", members=None, **kwargs):
        extract(self, path, [member for member in self.getmembers() if "_1" in member.name], **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "extractall", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("cifar-10", "test")
    assert names_in(places / "cache" / "cifar-10") == ["cifar-10-binary.tar.gz"]
    monkeypatch.setattr(tarfile.TarFile, "extractall", extract)
    assert len(load_dataset("cifar-10", "test")) == 4
    assert len(cifar_server) == 1  # the whole archive is not fetched again


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_10_folder_that_lacks_files_is_completed(places, cifar_server, split):
    folder = places / "cache" / "cifar-10" / "cifar-10-batches-bin"
    write_cifar(folder)
    (folder / ("data_batch_3.bin" if split == "train" else "test_batch.bin")).unlink()
    with pytest.raises(ResnetPathsError, match="an existing file"):
        load_dataset("cifar-10", split, download=False)
    assert len(load_dataset("cifar-10", split)) == (9 if split == "train" else 4)
    assert len(cifar_server) == 1


def test_cifar_10_archive_that_was_cut_is_fetched_again(places, cifar_server):
    root = places / "cache" / "cifar-10"
    root.mkdir(parents=True)
    archive = (places / "server" / "cifar-10-binary.tar.gz").read_bytes()
    (root / "cifar-10-binary.tar.gz").write_bytes(archive[: len(archive) // 2])
    assert len(load_dataset("cifar-10", "test")) == 4
    assert len(cifar_server) == 1


def test_cifar_10_archive_with_wrong_bytes_is_refused(places, cifar_server, monkeypatch):
    monkeypatch.setattr(datasets, "_CIFAR_10_MD5", "0" * 32)
    for _ in range(2):
        with pytest.raises(ResnetPathsError, match="download of cifar-10: got 'File not found or corrupted"):
            load_dataset("cifar-10", "test")
    assert len(cifar_server) == 2
    assert names_in(places / "cache" / "cifar-10") == ["cifar-10-binary.tar.gz"]

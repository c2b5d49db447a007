"""What all tests share: one thread a process, no network, small labelled images."""

from __future__ import annotations

import os
import sys
import urllib.request

import pytest

# Before torch is imported: tests run in parallel processes, and one thread each gives the same sums on every machine.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(autouse=True)
def _no_network_and_own_cache(monkeypatch, tmp_path_factory):
    """A test that would download fails at once, and none sees the user's own cache."""

    def refuse(request, *args, **kwargs):
        raise OSError(f"tests have no network: {getattr(request, 'full_url', request)}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("RESNET_PATHS_CACHE", str(tmp_path_factory.getbasetemp() / "empty-cache"))


@pytest.fixture(autouse=True)
def _no_figure_of_another_test():
    """What one test draws is no other's current axes."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def make_images():
    """Make random images whose brightness depends on their label, so that there is something to learn."""
    import torch

    from resnet_paths.reproduce.datasets import DATASETS, ImageDataset

    def make(num_images, seed=0, name="fashion-mnist"):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (num_images,), generator=generator)
        noise = torch.randint(60, (num_images, *DATASETS[name].shape), generator=generator)
        return ImageDataset(name, (noise + 20 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)

    return make


@pytest.fixture
def run(make_images):
    """Train on 40 images, so that batches of 16 end with a smaller one, and measure on 21."""
    from resnet_paths.reproduce.training import train

    splits = {"train_set": make_images(40), "test_set": make_images(21, seed=1)}

    def call(folder, settings, **options):
        return train(settings, folder, **{"accelerator": "cpu", "progress": False, **splits, **options})

    return call

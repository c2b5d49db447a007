"""Augmented mini-batches, determined by seed and epoch for any number of processes.

Crops and flips are drawn here and not by `torchvision.transforms.v2`, whose random numbers are from the global
generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from resnet_paths.reproduce.datasets import DATASETS
from resnet_paths.reproduce.texts import TextDataset
from resnet_paths.reproduce.training.settings import TrainingSettings
from resnet_paths.reproduce.training.tasks import TASKS, LabelledData
from resnet_paths.zoo.catalog import find_network

__all__ = ["augmented_batches", "examples_per_epoch", "generator_of"]


# Seed offsets of independent random streams.
_STREAMS = {"images": 0, "blocks": 2**30, "noise": 2**31}


def generator_of(settings: TrainingSettings, epoch: int, stream: str = "images") -> torch.Generator:
    """Generator of one kind of random numbers in one epoch, equal on every process.

    Args:
        settings: The training settings.
        epoch: Index of the epoch, counted from 0.
        stream: ``"images"`` for order and augmentation, ``"blocks"`` for drawn blocks, or ``"noise"``.

    Returns:
        A CPU generator.
    """
    return torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch + 1 + _STREAMS[stream])


def examples_per_epoch(dataset: LabelledData) -> int:
    """Number of images, or the number of windows that are drawn from a text."""
    return dataset.windows_per_epoch if isinstance(dataset, TextDataset) else len(dataset)


def augmented_batches(
    dataset: LabelledData, settings: TrainingSettings, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of one process in an epoch, with order, crops, flips and noise determined by (seed, epoch).

    From a text, windows are drawn at random places with replacement.

    Args:
        dataset: Images or text.
        settings: The training settings.
        epoch: Index of the epoch, counted from 0.
        rank: Index of the process.
        world_size: Number of processes that share each batch.

    Yields:
        Inputs, from normalised images [batch of the process, C, H, W] or tokens [batch of the process, context], and
        targets of the network's task.
    """
    task = TASKS[find_network(settings.network).task]
    generator = generator_of(settings, epoch)
    if isinstance(dataset, TextDataset):
        starts = torch.randint(len(dataset.text) - dataset.context, (dataset.windows_per_epoch,), generator=generator)
        for batch in torch.split(starts, settings.batch_size):
            yield dataset.windows(batch[rank::world_size])
        return
    noise_generator = generator_of(settings, epoch, "noise")
    order = torch.randperm(len(dataset), generator=generator)
    labels = torch.tensor(dataset.labels)
    padding = settings.crop_padding
    height, width = dataset.images.shape[-2:]
    for batch in torch.split(order, settings.batch_size):
        # Drawn for the whole batch on every process, so that the numbers do not depend on the number of processes.
        rows = torch.randint(2 * padding + 1, (len(batch), 1), generator=generator)
        columns = torch.randint(2 * padding + 1, (len(batch), 1), generator=generator)
        flipped = (torch.rand(len(batch), 1, generator=generator) < 0.5) & DATASETS[dataset.name].flips
        rows = rows + torch.arange(height)
        columns = columns + torch.where(flipped, torch.arange(width - 1, -1, -1), torch.arange(width))
        mine = slice(rank, None, world_size)
        padded = F.pad(dataset.images[batch[mine]], [padding] * 4)
        number = torch.arange(len(padded))[:, None, None]
        cropped = padded[number, :, rows[mine, :, None], columns[mine, None, :]]
        images = dataset.normalise(cropped.permute(0, 3, 1, 2))
        noise = task.noise((len(batch), *images.shape[1:]), noise_generator)
        yield task.example(images, labels[batch[mine]], None if noise is None else noise[mine])

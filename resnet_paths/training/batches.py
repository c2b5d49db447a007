"""Augmented mini-batches in an order that the seed and the epoch determine, however many processes share them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from resnet_paths.datasets import ImageDataset
from resnet_paths.training.settings import TrainingSettings

__all__ = ["augmented_batches"]


def augmented_batches(
    dataset: ImageDataset, settings: TrainingSettings, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One process's share of an epoch, in an order and with crops and flips that (seed, epoch) determine.

    Args:
        dataset: The images.
        settings: The run's settings.
        epoch: Number of the epoch, counted from 0.
        rank: Number of the process.
        world_size: How many processes share each batch.

    Yields:
        Normalised images [share of the batch, C, H, W] and their labels.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch + 1)
    order = torch.randperm(len(dataset), generator=generator)
    labels = torch.tensor(dataset.labels)
    padding = settings.crop_padding
    height, width = dataset.images.shape[-2:]
    for batch in torch.split(order, settings.batch_size):
        # Drawn for the whole batch on every process, so that the draws do not depend on their number.
        rows = torch.randint(2 * padding + 1, (len(batch), 1), generator=generator)
        columns = torch.randint(2 * padding + 1, (len(batch), 1), generator=generator)
        flipped = torch.rand(len(batch), 1, generator=generator) < 0.5
        rows = rows + torch.arange(height)
        columns = columns + torch.where(flipped, torch.arange(width - 1, -1, -1), torch.arange(width))
        mine = slice(rank, None, world_size)
        padded = F.pad(dataset.images[batch[mine]], [padding] * 4)
        number = torch.arange(len(padded))[:, None, None]
        cropped = padded[number, :, rows[mine, :, None], columns[mine, None, :]]
        yield dataset.normalise(cropped.permute(0, 3, 1, 2)), labels[batch[mine]]

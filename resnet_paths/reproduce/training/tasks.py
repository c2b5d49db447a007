"""Training tasks: classification, denoising and language modelling, with their losses and error measures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from resnet_paths.reproduce.datasets import ImageDataset
from resnet_paths.reproduce.texts import TextDataset

__all__ = [
    "TASKS",
    "Classification",
    "Denoising",
    "LabelledData",
    "LanguageModelling",
    "evaluate",
    "sum_losses",
    "to_device",
]

LabelledData: TypeAlias = ImageDataset | TextDataset
"""What the networks are trained on: images with labels, or windows of a text with the next tokens."""


class Classification:
    """Classification of images: the loss is the cross-entropy in nats, the measure is the error rate."""

    measure = "test_error_rate"

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor | None:
        """Noise for normalised images of shape [batch, C, H, W]; None for tasks without noise."""
        return None

    def example(
        self, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets from normalised images [batch, C, H, W], labels [batch] and noise."""
        return images, labels

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Loss per example, with reduction ``"mean"`` or ``"sum"`` over the batch."""
        return F.cross_entropy(outputs, targets, reduction=reduction)

    def num_wrong(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Number of wrong predictions in a batch."""
        return (outputs.argmax(1) != targets).sum()

    def error_rate(self, num_wrong: float, num_examples: int) -> float | None:
        """Fraction of wrong predictions; None for tasks without classes."""
        return num_wrong / num_examples

    def judge(self, loss: float, error_rate: float | None, dataset: LabelledData) -> float:
        """Value of `measure`, from the mean loss and the error rate on a data set."""
        assert error_rate is not None
        return error_rate


class Denoising(Classification):
    """Removal of Gaussian noise: the loss is the mean squared error per pixel, the measure is its square root.

    The noise has a standard deviation of 0.5; normalised images have about 1.
    """

    measure = "test_rmse"
    noise_std = 0.5

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Noise for normalised images of shape [batch, C, H, W]."""
        return torch.randn(*shape, generator=generator).mul_(self.noise_std)

    def example(
        self, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy and clean images, both [batch, C, H, W]."""
        assert noise is not None
        return images + noise, images

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Mean squared error per image, with reduction ``"mean"`` or ``"sum"`` over the batch."""
        total = F.mse_loss(outputs, targets)
        return total if reduction == "mean" else total * len(targets)

    def num_wrong(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Zero, since there are no classes."""
        return outputs.new_zeros(())

    def error_rate(self, num_wrong: float, num_examples: int) -> None:
        """None, since there are no classes."""

    def judge(self, loss: float, error_rate: float | None, dataset: LabelledData) -> float:
        """Square root of the mean squared error."""
        return math.sqrt(loss)


class LanguageModelling(Classification):
    """Prediction of the next token: the loss is the cross-entropy in nats per token, the measure is bits per byte."""

    measure = "test_bits_per_byte"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Mean over the tokens of a sequence, with reduction ``"mean"`` or ``"sum"`` over the batch."""
        total = F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
        return total if reduction == "mean" else total * len(targets)

    def num_wrong(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Number of wrong predictions in a batch, divided by the number of positions."""
        return (outputs.argmax(2) != targets).float().mean(1).sum()

    def judge(self, loss: float, error_rate: float | None, dataset: LabelledData) -> float:
        """Bits per byte, from the mean loss per token in nats."""
        assert isinstance(dataset, TextDataset)
        return loss / math.log(2) / dataset.bytes_per_token


TASKS = {"classification": Classification(), "denoising": Denoising(), "language": LanguageModelling()}
"""Tasks by name, see `resnet_paths.zoo.NetworkFacts.task`."""


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: LabelledData, batch_size: int = 100, *, task: str = "classification"
) -> tuple[float, float]:
    """Evaluate a network in float32 and eval mode; the mode of the model is restored.

    Args:
        model: The network; images are moved to the device of its parameters.
        dataset: Images or text.
        batch_size: Images or windows per batch. On a CPU, larger batches are slower: their activations do not fit into
            the cache.
        task: Key of `TASKS`. The noise of ``"denoising"`` is equal in every call.

    Returns:
        The mean loss and the measure of the task: mean cross-entropy in nats and error rate in [0, 1], mean squared
        error and its square root, or mean cross-entropy in nats per token and bits per byte.
    """
    device = next(model.parameters()).device
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    judged = TASKS[task]
    try:
        loss_sum, num_wrong = sum_losses(model, dataset, judged, torch.arange(len(dataset)), batch_size, device)
    finally:
        for module, training in was_training:
            module.training = training
    loss = loss_sum / len(dataset)
    return loss, judged.judge(loss, judged.error_rate(num_wrong, len(dataset)), dataset)


def sum_losses(
    model: nn.Module,
    dataset: LabelledData,
    task: Classification,
    indices: torch.Tensor,
    batch_size: int,
    device: torch.device,
) -> tuple[float, float]:
    """Sums over a subset of images, for one process of an evaluation.

    Args:
        model: The network, in eval mode.
        dataset: The images.
        task: The task.
        indices: Indices of the images.
        batch_size: Images per batch.
        device: Device of the model.

    Returns:
        The sum of losses, and the number of wrong predictions.
    """
    loss_sum, num_wrong = 0.0, 0.0
    for inputs, targets in _test_batches(dataset, task, indices, batch_size):
        outputs = model(to_device(inputs, device)).float()
        targets = targets.to(device)
        loss_sum += task.loss(outputs, targets, "sum").item()
        num_wrong += float(task.num_wrong(outputs, targets))
    return loss_sum, num_wrong


def to_device(inputs: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Inputs of a network on its device; images [batch, C, H, W] with the channels last in memory."""
    return inputs.to(device, memory_format=torch.channels_last) if inputs.dim() == 4 else inputs.to(device)


def _test_batches(
    dataset: LabelledData, task: Classification, indices: torch.Tensor, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of examples, in order."""
    if isinstance(dataset, TextDataset):
        for batch in torch.split(indices, batch_size):
            yield dataset.windows(batch * dataset.context)
        return
    labels = torch.tensor(dataset.labels)
    # Drawn for all images at once, so that the noise does not depend on batches and processes.
    noise = task.noise(dataset.images.shape, torch.Generator().manual_seed(0))
    for batch in torch.split(indices, batch_size):
        images = dataset.normalise(dataset.images[batch])
        yield task.example(images, labels[batch], None if noise is None else noise[batch])

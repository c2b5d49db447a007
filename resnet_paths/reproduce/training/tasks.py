"""What networks learn from images, and how good they are at it: naming what is shown, or taking noise away."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from resnet_paths.reproduce.datasets import ImageDataset

__all__ = ["TASKS", "Classification", "Denoising", "evaluate", "sum_losses"]


class Classification:
    """Naming the class of an image: the loss is the cross-entropy in nats, and judged is the error rate."""

    measure = "test_error_rate"

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor | None:
        """Noise for normalised images of a shape [batch, C, H, W]; None where the task has none."""
        return None

    def example(
        self, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets made from normalised images [batch, C, H, W], labels [batch] and the noise for them."""
        return images, labels

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The ``"mean"`` or the ``"sum"`` over the batch of the loss of an example."""
        return F.cross_entropy(outputs, targets, reduction=reduction)

    def num_wrong(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """How many answers of a batch are wrong."""
        return (outputs.argmax(1) != targets).sum()

    def error_rate(self, num_wrong: float, num_examples: int) -> float | None:
        """The share of wrong answers; None where no answer is right or wrong."""
        return num_wrong / num_examples

    def judge(self, loss: float, error_rate: float | None) -> float:
        """The number called `measure`, from the mean loss and the error rate."""
        assert error_rate is not None
        return error_rate


class Denoising(Classification):
    """Taking Gaussian noise away: the loss is the mean squared error of a pixel, and judged is its root.

    The noise has a standard deviation of 0.5 in units of normalised images, whose own is about 1.
    """

    measure = "test_rmse"
    noise_std = 0.5

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Noise for normalised images of a shape [batch, C, H, W]."""
        return torch.randn(*shape, generator=generator).mul_(self.noise_std)

    def example(
        self, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy images and clean ones, both [batch, C, H, W]."""
        assert noise is not None
        return images + noise, images

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """The ``"mean"`` or the ``"sum"`` over the batch of the mean squared error of an image's pixels."""
        total = F.mse_loss(outputs, targets)
        return total if reduction == "mean" else total * len(targets)

    def num_wrong(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Zero: images are more or less clean, never right or wrong."""
        return outputs.new_zeros(())

    def error_rate(self, num_wrong: float, num_examples: int) -> None:
        """None: images are more or less clean, never right or wrong."""

    def judge(self, loss: float, error_rate: float | None) -> float:
        """The root of the mean squared error."""
        return math.sqrt(loss)


TASKS = {"classification": Classification(), "denoising": Denoising()}
"""Tasks by the name that `resnet_paths.zoo.NetworkFacts.task` has."""


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: ImageDataset, batch_size: int = 500, *, task: str = "classification"
) -> tuple[float, float]:
    """How good a network is, in float32 and eval mode; the model's mode is put back.

    Args:
        model: A network for the task; images are moved to the device of its parameters.
        dataset: The images.
        batch_size: Images at a time.
        task: Key of `TASKS`. The noise of ``"denoising"`` is the same for an image in every call.

    Returns:
        The mean loss and what the task is judged by: mean cross-entropy in nats and error rate in [0, 1], or mean
        squared error and its root.
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
    return loss, judged.judge(loss, judged.error_rate(num_wrong, len(dataset)))


def sum_losses(
    model: nn.Module,
    dataset: ImageDataset,
    task: Classification,
    indices: torch.Tensor,
    batch_size: int,
    device: torch.device,
) -> tuple[float, int]:
    """Sums over some images, for one process's share of an evaluation.

    Args:
        model: A network for the task, in eval mode.
        dataset: The images.
        task: The task.
        indices: Numbers of the images.
        batch_size: Images at a time.
        device: Where the model is.

    Returns:
        The sum of their losses, and how many answers are wrong.
    """
    labels = torch.tensor(dataset.labels)
    # Drawn at once, so that an image has the same noise whatever the batches and processes are.
    noise = task.noise(dataset.images.shape, torch.Generator().manual_seed(0))
    loss_sum, num_wrong = 0.0, 0
    for batch in torch.split(indices, batch_size):
        images = dataset.normalise(dataset.images[batch])
        inputs, targets = task.example(images, labels[batch], None if noise is None else noise[batch])
        outputs = model(inputs.to(device, memory_format=torch.channels_last)).float()
        targets = targets.to(device)
        loss_sum += task.loss(outputs, targets, "sum").item()
        num_wrong += int(task.num_wrong(outputs, targets))
    return loss_sum, num_wrong

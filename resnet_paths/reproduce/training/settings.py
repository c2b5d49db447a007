"""Training settings, and the learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypedDict

from resnet_paths._utils.arguments import require_choice, require_fraction
from resnet_paths._utils.errors import ResnetPathsError, nearest_names
from resnet_paths.reproduce.datasets import DATASETS, DatasetFacts
from resnet_paths.reproduce.texts import TEXTS
from resnet_paths.zoo.catalog import check_num_drawn_blocks, find_network

__all__ = ["LogRow", "TestMeasures", "TrainingMeasures", "TrainingSettings", "learning_rate_at"]

# Precisions of Fabric with float32 weights.
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_OPTIMIZERS = ("sgd", "adamw")
_LARGEST_SEED = 2**32 - 1
# Replaced by the value of the network's recipe in __post_init__, hence not part of the field's type.
_FROM_RECIPE: Any = None


class TrainingMeasures(TypedDict):
    """What an epoch measures while it trains."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_error_rate: float | None


class TestMeasures(TypedDict):
    """What an epoch measures on the test images."""

    test_loss: float
    test_error_rate: float | None


class LogRow(TrainingMeasures, TestMeasures):
    """A row of the log of a run."""

    network: str
    seed: int
    seconds: float


@dataclass(frozen=True)
class TrainingSettings:
    """All settings that determine the trained weights.

    The defaults are those of the shipped networks, except for `epochs` and `seed`, which `list_networks` states.
    `dataset`, `batch_size`, `learning_rate`, `weight_decay`, `optimizer` and `max_gradient_norm` default to the recipe
    of the network (`resnet_paths.zoo.Recipe`). Gradients with a larger norm than `max_gradient_norm` are scaled down
    to it; ``math.inf`` is no limit. An epoch on text is 4,096 windows at random places.
    The optimizer is SGD with Nesterov momentum, or AdamW with `momentum` as its first decay rate. The learning rate
    increases linearly over `warmup_epochs` and decreases to zero with a half cosine. Images are padded by
    `crop_padding` pixels (1 for digits, 2 for others), cropped at random and, except digits, flipped at random (He et
    al. 2016a, section 4.2). `precision` is Fabric's,
    ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``; ``"bf16-mixed"`` is recommended for GPUs and for processors with
    bfloat16 matrix units, and slower than ``"32-true"`` on others. `num_drawn_blocks` is the number of blocks of
    ``"effective-..."`` that each mini-batch trains, or a pair of minimum and maximum (Veit et al. 2016, section 4.3).
    """

    network: str
    dataset: str = _FROM_RECIPE
    epochs: int = 12
    seed: int = 0
    batch_size: int = _FROM_RECIPE
    learning_rate: float = _FROM_RECIPE
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = _FROM_RECIPE
    crop_padding: int = _FROM_RECIPE
    precision: str = "32-true"
    optimizer: str = _FROM_RECIPE
    num_drawn_blocks: int | tuple[int, int] | None = None
    max_gradient_norm: float | None = _FROM_RECIPE

    def __post_init__(self) -> None:
        """Fill in the recipe and validate the settings."""
        recipe = find_network(self.network).recipe
        for name in ("dataset", "batch_size", "learning_rate", "weight_decay", "optimizer", "max_gradient_norm"):
            if getattr(self, name) is _FROM_RECIPE:
                object.__setattr__(self, name, getattr(recipe, name))
        drawn = check_num_drawn_blocks(self.network, self.num_drawn_blocks)
        object.__setattr__(self, "num_drawn_blocks", drawn)
        known = TEXTS if find_network(self.network).task == "language" else tuple(DATASETS)
        if self.dataset not in known:
            raise ResnetPathsError(
                "dataset", self.dataset, f"one of {nearest_names(str(self.dataset), known, cutoff=0)}"
            )
        if self.crop_padding is _FROM_RECIPE:
            facts = DATASETS.get(self.dataset)
            object.__setattr__(self, "crop_padding", DatasetFacts.crop_padding if facts is None else facts.crop_padding)
        for name, least in (("epochs", 1), ("batch_size", 2), ("crop_padding", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ResnetPathsError(name, value, f"an int of at least {least}")
        if self.seed > _LARGEST_SEED:
            raise ResnetPathsError("seed", self.seed, f"an int from 0 to {_LARGEST_SEED}")
        for name in ("learning_rate", "warmup_epochs", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ResnetPathsError(name, value, "a finite number of at least 0")
        if not self.learning_rate > 0:
            raise ResnetPathsError("learning_rate", self.learning_rate, "a positive number")
        require_fraction("momentum", self.momentum)
        norm = self.max_gradient_norm
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            raise ResnetPathsError("max_gradient_norm", norm, "a positive number, inf for no limit")
        for name, known in (("precision", _PRECISIONS), ("optimizer", _OPTIMIZERS)):
            require_choice(name, getattr(self, name), known)


def learning_rate_at(settings: TrainingSettings, epoch: float) -> float:
    """Learning rate at a point of training: linear warm-up from 0, then a half cosine to 0.

    A closed form instead of `torch.optim.lr_scheduler`, whose recursive schedules have a state to save and resume.

    Args:
        settings: The training settings.
        epoch: Completed epochs, a float in [0, settings.epochs].

    Returns:
        The learning rate.
    """
    warmup = min(settings.warmup_epochs, settings.epochs / 2)
    if epoch < warmup:
        return settings.learning_rate * epoch / warmup
    done = (epoch - warmup) / (settings.epochs - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

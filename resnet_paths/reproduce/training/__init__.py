"""Training by name: ``resnet-paths train NAME``.

On the CPU, equal seeds give equal weights, also for runs that were interrupted and resumed. All random numbers of epoch
`e` are from a generator seeded by (seed, e), and a checkpoint is written at the end of each epoch; an interrupted run
resumes after the last finished epoch and repeats the unfinished one exactly. Devices, precision and multiple machines
are handled by Lightning Fabric (`accelerator`, `devices`, `num_nodes`, `precision`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from resnet_paths._utils.errors import ResnetPathsError, requires_extra
from resnet_paths._utils.files import write_then_rename
from resnet_paths.reproduce.datasets import DATASETS, load_dataset
from resnet_paths.reproduce.training.batches import augmented_batches, examples_per_epoch, generator_of
from resnet_paths.reproduce.training.checkpoints import (
    check_settings,
    check_snapshots,
    resume,
    write_checkpoint,
)
from resnet_paths.reproduce.training.settings import (
    LogRow,
    TestMeasures,
    TrainingMeasures,
    TrainingSettings,
    learning_rate_at,
)
from resnet_paths.reproduce.training.tasks import TASKS, Classification, LabelledData, evaluate, sum_losses, to_device
from resnet_paths.zoo.catalog import build_network, find_network
from resnet_paths.zoo.weights import snapshot_file, write_tensors

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["TrainingSettings", "evaluate", "train"]


def train(
    settings: TrainingSettings,
    folder: str | Path = "runs",
    *,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    snapshots: Sequence[int] = (),
    train_set: LabelledData | None = None,
    test_set: LabelledData | None = None,
    progress: bool = True,
) -> Path:
    """Train a network, or resume an interrupted run.

    Args:
        settings: The training settings.
        folder: Folder for ``NAME-seedS.safetensors`` (weights and settings), ``NAME-seedS.csv`` (the log, one row per
            epoch), and during the run ``NAME-seedS.checkpoint.safetensors``.
        accelerator: Fabric's: ``"auto"``, ``"cpu"``, ``"gpu"``...
        devices: Fabric's: number of processes per machine.
        num_nodes: Fabric's: number of machines.
        strategy: Fabric's: ``"auto"`` or ``"ddp"``.
        snapshots: Numbers of epochs after which to save the weights, as ``NAME-seedS.epochE.safetensors``; 0 is the
            initialisation, with BatchNorm statistics measured on training images.
        train_set: Training images instead of the training split of the data set.
        test_set: Test images instead of the test split; used for evaluation only, not for selection.
        progress: Whether to show a progress bar.

    Returns:
        Path of the weights file.

    Raises:
        ResnetPathsError: If the loss becomes non-finite, `folder` cannot be created or contains a run of this name with
            other settings, a snapshot is outside this run or of an epoch that has passed without saving it, the images
            are of another data set, or Fabric does not support the requested devices.
    """
    _check_arguments(settings, snapshots, train_set=train_set, test_set=test_set)
    stem = Path(folder) / f"{settings.network}-seed{settings.seed}"
    weights, checkpoint = stem.with_suffix(".safetensors"), stem.with_suffix(".checkpoint.safetensors")
    _check_previous(weights, checkpoint, settings, snapshots)
    fabric = _launch(
        find_network(settings.network).draws_blocks,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=settings.precision,
    )
    _make_folder(Path(folder))
    if weights.is_file():
        if fabric.global_rank == 0:
            checkpoint.unlink(missing_ok=True)  # remains if the run was killed before deleting it
        return weights
    train_set = load_dataset(settings.dataset, "train") if train_set is None else train_set
    test_set = load_dataset(settings.dataset, "test") if test_set is None else test_set
    _check_last_batch(examples_per_epoch(train_set), settings.batch_size, fabric.world_size)
    raw = _initialised(settings)
    bare = _optimizer(raw, settings)
    model, optimizer = fabric.setup(raw, bare)
    log: list[LogRow] = []
    if checkpoint.is_file():
        # After the setup, so that tensors are loaded to the device of the weights.
        log = resume(checkpoint, raw, bare, fabric.strategy.precision, settings)
    fabric.barrier()
    if 0 in snapshots and not log and fabric.global_rank == 0:
        with _measured_batchnorm(fabric, model, raw, train_set, settings):
            _write_finished(snapshot_file(weights, 0), raw, settings, log, test_set)
    for row in _epochs(fabric, model, optimizer, train_set, test_set, settings, len(log), progress=progress):
        log.append(row)
        if fabric.global_rank == 0:
            # Before the checkpoint: a run that is killed between the two writes the same snapshot again.
            if len(log) in snapshots:
                _write_finished(snapshot_file(weights, len(log)), raw, settings, log, test_set)
            write_checkpoint(checkpoint, raw, bare, fabric.strategy.precision, settings, log)
            _write_log(stem.with_suffix(".csv"), log)
    if fabric.global_rank == 0:
        _write_log(stem.with_suffix(".csv"), log)  # again, in case the run was killed just before it was written
        _write_finished(weights, raw, settings, log, test_set)
        checkpoint.unlink(missing_ok=True)
    fabric.barrier()
    return weights


def _check_arguments(settings: TrainingSettings, snapshots: Sequence[int], **sets: LabelledData | None) -> None:
    for epoch in snapshots:
        if not isinstance(epoch, SupportsIndex) or not 0 <= operator.index(epoch) <= settings.epochs:
            raise ResnetPathsError("snapshots", epoch, f"numbers of epochs from 0 to {settings.epochs}")
    for argument, images in sets.items():
        if images is not None and images.name != settings.dataset:
            raise ResnetPathsError(argument, images.name, f"images of {settings.dataset!r}, as in the settings")


def _check_previous(weights: Path, checkpoint: Path, settings: TrainingSettings, snapshots: Sequence[int]) -> None:
    """Check that a run in the same folder, finished or not, is the one that is requested."""
    previous = weights if weights.is_file() else checkpoint
    if previous.is_file():
        check_settings(previous, settings)
        check_snapshots(previous, weights, snapshots)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResnetPathsError("folder", str(folder), "a writable folder", f"{error}.") from error


def _initialised(settings: TrainingSettings) -> nn.Module:
    """The network before training."""
    network = build_network(
        settings.network,
        torch.Generator().manual_seed(settings.seed),
        num_drawn_blocks=settings.num_drawn_blocks,
        **_shape_of_network(settings),
    )
    return network.to(memory_format=torch.channels_last)


def _check_last_batch(num_images: int, batch_size: int, num_processes: int) -> None:
    last_batch = num_images % batch_size or batch_size
    if last_batch < num_processes:
        raise ResnetPathsError(
            "batch_size",
            batch_size,
            f"a size that leaves at least one image of each batch to each of {num_processes} processes",
            f"The last batch of {num_images} images would have {last_batch}.",
        )


def _epochs(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_set: LabelledData,
    test_set: LabelledData,
    settings: TrainingSettings,
    num_done: int,
    *,
    progress: bool,
) -> Iterator[LogRow]:
    """Train the remaining epochs; yields the row of the log of each."""
    steps = -(-examples_per_epoch(train_set) // settings.batch_size)
    task = _task(settings)
    with tqdm(
        total=settings.epochs * steps,
        initial=num_done * steps,
        desc=settings.network,
        unit="batch",
        disable=not progress or fabric.global_rank > 0,
        mininterval=1.0,
    ) as bar:
        for epoch in range(num_done, settings.epochs):
            started = time.perf_counter()
            trained = _train_one_epoch(fabric, model, optimizer, train_set, settings, epoch, bar)
            tested = _measure(fabric, model, test_set, settings)
            if not math.isfinite(tested["test_loss"]):
                _raise_diverged(settings, epoch)
            seconds = round(time.perf_counter() - started, 1)
            judged = task.judge(tested["test_loss"], tested["test_error_rate"], test_set)
            bar.set_postfix({task.measure: f"{judged:.4f}"})
            yield {"network": settings.network, "seed": settings.seed, **trained, **tested, "seconds": seconds}


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(), settings.learning_rate, (settings.momentum, 0.999), weight_decay=settings.weight_decay
        )
    return torch.optim.SGD(
        model.parameters(),
        settings.learning_rate,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )


def _train_one_epoch(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: LabelledData,
    settings: TrainingSettings,
    epoch: int,
    bar: tqdm[object],
) -> TrainingMeasures:
    model.train()
    loss_sum, num_wrong, num_seen = (torch.zeros((), device=fabric.device) for _ in range(3))
    num_steps = -(-examples_per_epoch(dataset) // settings.batch_size)
    batches = augmented_batches(dataset, settings, epoch, fabric.global_rank, fabric.world_size)
    rate = 0.0
    task = _task(settings)
    draw_blocks = getattr(model.module, "draw_blocks", None)
    generator = generator_of(settings, epoch, "blocks")  # the same on every process
    for step, (inputs, targets) in enumerate(batches):
        if draw_blocks is not None:
            draw_blocks(generator)
        rate = learning_rate_at(settings, epoch + (step + 1) / num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        targets = targets.to(fabric.device)
        outputs = model(to_device(inputs, fabric.device)).float()
        loss = task.loss(outputs, targets)
        optimizer.zero_grad()
        fabric.backward(loss)
        if settings.max_gradient_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=settings.max_gradient_norm)
        optimizer.step()
        loss_sum += loss.detach() * len(targets)
        num_wrong += task.num_wrong(outputs.detach(), targets)
        num_seen += len(targets)
        bar.update()
        # Checked every 50 steps, since each check waits for the device.
        if step % 50 == 49 or step == num_steps - 1:
            # Over all processes, so that all of them stop at the same step.
            loss_of_all = _summed(fabric, loss_sum.clone()).item()
            if not math.isfinite(loss_of_all):
                _raise_diverged(settings, epoch)
    loss_sum, num_wrong, num_seen = _summed(fabric, torch.stack([loss_sum, num_wrong, num_seen]))
    return {
        "epoch": epoch + 1,
        "learning_rate": rate,
        "train_loss": (loss_sum / num_seen).item(),
        "train_error_rate": task.error_rate(num_wrong.item(), int(num_seen)),
    }


def _summed(fabric: Fabric, tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    total = fabric.all_reduce(tensor, reduce_op="sum")
    assert isinstance(total, torch.Tensor)  # as the argument is one
    return total


def _launch(draws_blocks: bool, **options: Any) -> Fabric:
    """Create Fabric and start its processes; raises for unsupported options."""
    with requires_extra("train"):
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy
        from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        fabric = Fabric(**options)
        if draws_blocks and isinstance(fabric.strategy, DDPStrategy):
            # Parameters of blocks that are not drawn have no gradient, which the processes would wait for.
            fabric = Fabric(**options | {"strategy": "ddp_find_unused_parameters_true"})
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        names = "accelerator, devices, num_nodes, strategy, precision"
        values = ", ".join(str(options[name]) for name in names.split(", "))
        raise ResnetPathsError(
            names, values, "values that Lightning Fabric supports on this machine", " ".join(str(error).split())
        ) from error
    fabric.launch()
    return fabric


def _raise_diverged(settings: TrainingSettings, epoch: int) -> NoReturn:
    raise ResnetPathsError(
        "learning_rate",
        settings.learning_rate,
        f"a learning rate with a finite loss; it became non-finite in epoch {epoch + 1}",
        "Nothing was written for this epoch. Try a third of this rate.",
    )


def _task(settings: TrainingSettings) -> Classification:
    return TASKS[find_network(settings.network).task]


def _measure(fabric: Fabric, model: nn.Module, dataset: LabelledData, settings: TrainingSettings) -> TestMeasures:
    """Test loss and error in the training precision, with the images distributed over the processes."""
    model.eval()
    task = _task(settings)
    mine = torch.arange(fabric.global_rank, len(dataset), fabric.world_size)
    with torch.inference_mode():
        sums = torch.tensor(sum_losses(model, dataset, task, mine, settings.batch_size * 4, fabric.device))
    loss_sum, num_wrong = _summed(fabric, sums.to(fabric.device)).tolist()
    return {"test_loss": loss_sum / len(dataset), "test_error_rate": task.error_rate(num_wrong, len(dataset))}


def _shape_of_network(settings: TrainingSettings) -> dict[str, int]:
    if settings.dataset not in DATASETS:
        return {"in_channels": 1, "num_classes": find_network(settings.network).num_classes}
    facts = DATASETS[settings.dataset]
    return {"in_channels": facts.shape[0], "num_classes": len(facts.classes)}


def _write_finished(
    path: Path, model: nn.Module, settings: TrainingSettings, log: list[LogRow], test_set: LabelledData
) -> None:
    """Write weights for `load_network`, with settings, log and float32 test error in their metadata."""
    task = find_network(settings.network).task
    loss, judged = evaluate(model, test_set, task=task)
    metadata = {
        **asdict(settings),
        **_shape_of_network(settings),
        "log": log,
        "epochs_done": len(log),
        TASKS[task].measure: judged,
        "test_loss": loss,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
    }
    write_tensors(path, model.state_dict(), metadata)


@contextlib.contextmanager
def _measured_batchnorm(
    fabric: Fabric, model: nn.Module, raw: nn.Module, dataset: LabelledData, settings: TrainingSettings
) -> Iterator[None]:
    """Context in which BatchNorm statistics are measured on ten batches.

    With the initial statistics, 0 and 1, an untrained network in eval mode would differ from that in training mode.
    """
    norms = [module for module in raw.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    for norm in norms:
        norm.momentum = None  # cumulative average over batches
    model.train()
    with torch.no_grad():
        batches = augmented_batches(dataset, settings, 0)
        for images, _ in itertools.islice(batches, 10):
            model(to_device(images, fabric.device))
    try:
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])


def _write_log(path: Path, log: list[LogRow]) -> None:
    with write_then_rename(path) as temporary:
        pd.DataFrame(log).to_csv(temporary, index=False, float_format="%.6g")

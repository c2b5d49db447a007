"""Storing finished runs for `resnet_paths.load_network`, in half precision if this does not change the error.

Each file states its test error, which can be verified by `published_errors`.
"""

from __future__ import annotations

import functools
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.files import write_then_rename
from resnet_paths.reproduce.datasets import load_dataset
from resnet_paths.reproduce.training.tasks import TASKS, LabelledData, evaluate
from resnet_paths.zoo import NETWORKS, find_network, load_network, shipped_networks, shipped_weights
from resnet_paths.zoo.weights import read_metadata, snapshot_file, weights_in, write_tensors

__all__ = ["publish", "published_errors"]

# 0.01 points, one image of 10,000, or 0.0001 bits per byte, plus a tolerance for rounding.
_MAX_CHANGE = 1.000001e-4
# If rounding all parameters changes the error, they are divided into parts, at most this many: each attempt takes an
# evaluation.
_MAX_PARTS = 8


def publish(
    weights: str | Path, folder: str | Path | None = None, *, test_set: LabelledData | None = None
) -> list[Path]:
    """Store the weights, snapshots and log of a finished run for `resnet_paths.load_network`.

    Parameters are stored in float16 if this changes the test error, evaluated in float32, by at most 0.01 points: all
    of them, or those parts for which this is the case. Other parameters, parameters outside the range of float16, and
    BatchNorm statistics are stored in float32. The metadata contain the dtypes (``stored_as``), the test error before
    (``trained_test_error_rate``) and after (``test_error_rate``).

    Args:
        weights: ``NAME-seedS.safetensors`` written by `train`, with its log and snapshots in the same folder.
        folder: Folder to store it in, as ``NAME.safetensors`` for seed 0, under its name for other seeds; by default
            ``data/networks`` of the checkout, or its folder of the data set if that is not the recipe's, from which
            `load_network` loads.
        test_set: Images for the evaluation instead of the test split of the data set.

    Returns:
        The written weights files, that of the end of training first.

    Raises:
        ResnetPathsError: If the file is incomplete, or not that of a finished run.
    """
    source = Path(weights)
    metadata, log = read_metadata(source), source.with_suffix(".csv")
    is_finished = "epochs_done" in metadata and metadata["epochs_done"] == metadata["epochs"]
    if not is_finished or not log.is_file():
        raise ResnetPathsError(
            "weights",
            str(source),
            "the weights of a finished run of 'resnet-paths train', with their log in the same folder",
            "Snapshots are stored together with the final weights.",
        )
    network, seed = metadata["network"], metadata["seed"]
    stem = network if seed == 0 else f"{network}-seed{seed}"
    place = shipped_networks(network, metadata["dataset"]) if folder is None else Path(folder)
    target = place / f"{stem}.safetensors"
    if test_set is None:
        test_set = load_dataset(metadata["dataset"], "test")
    pairs = {source: target}
    for (other, epoch), path in weights_in(source.parent, network).items():
        if other == seed and epoch is not None:
            pairs[path] = snapshot_file(target, epoch)
    for path, stored in pairs.items():
        _store(path, stored, network, test_set)
    with write_then_rename(target.with_suffix(".csv")) as temporary:
        shutil.copyfile(log, temporary)
    return list(pairs.values())


def published_errors(
    folder: str | Path | None = None, *, test_set: LabelledData | None = None, progress: bool = True
) -> pd.DataFrame:
    """Evaluate every stored file and compare its test error with the stated one.

    As many files are evaluated at once, each in a process of its own, as torch has threads.

    Args:
        folder: Folder of the files; all files of ``data/networks`` of the checkout by default.
        test_set: Images for the evaluation instead of the test split of the data set.
        progress: Whether to show a progress bar over files.

    Returns:
        One row per file: ``network``, ``dataset``, ``seed``, ``epoch`` (of a snapshot; the last one of the run
        otherwise), ``measure`` (``test_error_rate``, ``test_rmse`` of a denoiser, or ``test_bits_per_byte`` of a
        language model), ``stated``, ``measured``, and ``as_stated``, whether the two are within 0.0001.
    """
    files = [
        (name, path)
        for name in NETWORKS
        for path in (shipped_weights(name) if folder is None else weights_in(Path(folder), name)).values()
    ]
    check = functools.partial(_published_error, test_set=test_set)
    num_processes = min(torch.get_num_threads(), len(files))
    bar = functools.partial(tqdm, desc="stored networks", unit="file", total=len(files), disable=not progress)
    if num_processes <= 1:
        return pd.DataFrame(bar(map(check, files)))
    # Most operations of these networks are too small for two threads: two processes of one thread take less time.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, torch.set_num_threads, (1,)) as executor:
        return pd.DataFrame(bar(executor.map(check, files)))


def _published_error(file: tuple[str, Path], test_set: LabelledData | None) -> dict[str, object]:
    """A row of `published_errors`."""
    name, path = file
    metadata, task = read_metadata(path), find_network(name).task
    images = load_dataset(metadata["dataset"], "test") if test_set is None else test_set
    # Convolutions of few channels are faster in this layout on a CPU.
    model = load_network(name, path).to(memory_format=torch.channels_last)
    measured = evaluate(model, images, task=task)[1]
    measure = TASKS[task].measure
    return {
        "network": name,
        "dataset": metadata["dataset"],
        "seed": metadata["seed"],
        "epoch": metadata.get("epochs_done", metadata["epochs"]),
        "measure": measure,
        "stated": metadata[measure],
        "measured": measured,
        "as_stated": abs(measured - metadata[measure]) <= _MAX_CHANGE,
    }


def _store(source: Path, target: Path, network: str, test_set: LabelledData) -> None:
    task = find_network(network).task
    model = load_network(network, source)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    halves = _halves(model)
    before = after = evaluate(model, test_set, task=task)
    num_halved, untried = 0, [list(halves)]
    while untried:
        names = untried.pop()
        rounded = tensors | {name: halves[name] for name in names}
        model.load_state_dict(rounded)
        measured = evaluate(model, test_set, task=task)
        if abs(measured[1] - before[1]) <= _MAX_CHANGE:
            tensors, after, num_halved = rounded, measured, num_halved + len(names)
        elif len(names) > max(1, len(halves) / _MAX_PARTS):
            middle = len(names) // 2
            untried += [names[middle:], names[:middle]]
    num_parameters = len(list(model.parameters()))
    kinds = [kind for kind, some in (("float16", num_halved), ("float32", num_parameters - num_halved)) if some]
    metadata = read_metadata(source)
    metadata |= {
        "stored_as": " and ".join(kinds),
        f"trained_{TASKS[task].measure}": before[1],
        TASKS[task].measure: after[1],
        "test_loss": after[0],
    }
    write_tensors(target, tensors, metadata)


def _halves(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters in the range of float16, converted; BatchNorm statistics are few and may underflow."""
    halves = {name: parameter.detach().to(torch.float16) for name, parameter in model.named_parameters()}
    return {name: half for name, half in halves.items() if bool(half.isfinite().all())}

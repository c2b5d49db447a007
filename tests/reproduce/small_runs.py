"""Small runs of training, publishing and reproducing, in processes that are killed, with no chance to clean up."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import torch
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file
from tqdm import tqdm

from resnet_paths.reproduce.datasets import ImageDataset
from resnet_paths.reproduce.runner import reproduce
from resnet_paths.reproduce.training import TrainingSettings, train
from resnet_paths.reproduce.training.publishing import publish
from resnet_paths.zoo.weights import read_metadata, read_tensors
from tests.processes import run, server

ROOT = Path(__file__).parents[2]


def same_run(first, second):
    """Assert that two weights files and their logs are equal but for the seconds."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    stated, again = read_metadata(first), read_metadata(second)
    for metadata in (stated, again):
        for row in metadata["log"]:
            assert row.pop("seconds") >= 0
    assert stated == again
    logs = [pd.read_csv(path.with_suffix(".csv")).drop(columns="seconds") for path in (first, second)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


def start_training(folder, settings, **options):
    """Train on 40 images in a new process."""
    command = [sys.executable, "-m", "tests.reproduce.small_runs", str(folder)]
    command += [json.dumps(dataclasses.asdict(settings)), json.dumps(options)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def killed_at(moment, function, *arguments):
    """Run in a process that kills itself at a moment; all weights that have their final name are complete then.

    Args:
        moment: Name of a step, and the number of the call of this step at which to die, from 1.
        function: What to run.
        *arguments: Its arguments; the first is the folder that it writes to.

    Returns:
        True.
    """
    assert run(dying, moment, function, *arguments) == -signal.SIGKILL
    for path in arguments[0].glob("[!.]*.safetensors"):
        read_tensors(path)
    return True


def killed_and_resumed(folder, settings, moments):
    """Start training again and again, each time killed at the next of `moments`, and once more to its end.

    Returns:
        The number of kills.
    """
    killed = sum(killed_at(moment, trained, folder, settings) for moment in moments)
    assert run(trained, folder, settings) == 0
    return killed


SETTINGS = TrainingSettings("plain-20", epochs=3, batch_size=16, seed=4)
NAME = "plain-20-seed4"
# Of each run; renames are those of checkpoint and log after each epoch, then of log and weights.
MOMENTS = (
    (("half a file", 1), ("in a batch", 4), ("half a file", 2), ("half a file", 2)),
    (("before the rename", 1), ("after the rename", 1), ("before the rename", 5), ("after the rename", 2)),
    (("in a batch", 1), ("in a batch", 3), ("after the rename", 2), ("in a batch", 2)),
    (("after the rename", 2), ("half a file", 1), ("before the rename", 4)),
)


def kill_training(times, scratch):
    """Kill runs of training at several moments each, and resume them to their end.

    Returns:
        How many kills left nothing unfinished under a final name, in runs whose weights and log in the end are those of
        a run that nothing stopped.
    """
    assert run(trained, scratch / "whole", SETTINGS) == 0
    good = 0
    for number, moments in enumerate(MOMENTS):
        if good < times:
            folder = scratch / f"run{number}"
            killed = killed_and_resumed(folder, SETTINGS, moments[: times - good])
            assert sorted(path.name for path in folder.glob("[!.]*")) == [f"{NAME}.csv", f"{NAME}.safetensors"]
            same_run(folder / f"{NAME}.safetensors", scratch / "whole" / f"{NAME}.safetensors")
            good += killed
    return good


def kill_publishing(times, scratch):
    """Kill publishing a run of two snapshots at a step of each of its files, and publish again.

    Returns:
        How many kills left nothing unfinished under a final name, and were followed by the same files as without.
    """
    assert run(trained, scratch / "runs", dataclasses.replace(SETTINGS, epochs=2), (0, 1)) == 0
    weights = scratch / "runs" / f"{NAME}.safetensors"
    assert run(published, scratch / "whole", weights) == 0
    expected = contents_of(scratch / "whole")
    places = ("half a file", "before the rename", "after the rename")
    moments = [(place, call) for call in (1, 2, 3) for place in places] + [("before the rename", 4)]
    good = 0
    for number, moment in enumerate(moments[:times]):
        folder = scratch / f"published{number}"
        killed = killed_at(moment, published, folder, weights)
        assert run(published, folder, weights) == 0
        good += killed and contents_of(folder) == expected
    return good


def contents_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("[!.]*")) if path.is_file()}


CELLS = """
from pathlib import Path
from resnet_paths._utils.files import write_then_rename

for number in range(NUMBER):
    with write_then_rename(Path(figures_folder) / f"figureNUMBER{number}.svg") as temporary:
        temporary.write_text("<svg>" + 100000 * "x" + "</svg>")

print(sorted(path.name for path in Path(figures_folder).glob("figureNUMBER*")))
"""


def reproduced(folder):
    failed = [r for r in reproduce(folder / "out", folder=folder / "notebooks", progress=False) if r.error]
    assert not failed, failed


def kill_reproducing(times, scratch):
    """Kill `reproduce` at random moments, from its first notebook to its last, then let it end.

    Returns:
        How many kills left whole notebooks, pages, tables and figures only, if in the end they are those of a run that
        nothing stopped.
    """
    for name in ("whole", "killed"):
        (scratch / name / "notebooks").mkdir(parents=True)
        for number in (2, 3):
            tagged = new_code_cell('profile = figures_folder = device = ""', metadata={"tags": ["parameters"]})
            parts = CELLS.replace("NUMBER", str(number)).split("\n\n")
            cells = [tagged, *(new_code_cell(part.strip()) for part in parts)]
            for position, cell in enumerate(cells):
                cell["id"] = f"cell{position}"
            nbformat.write(new_notebook(cells=cells), scratch / name / "notebooks" / f"0{number}.ipynb")
    assert run(time.sleep, 0) == 0  # the server has imported everything
    start = time.monotonic()
    assert run(reproduced, scratch / "whole") == 0
    seconds, moments, good = time.monotonic() - start, random.Random(0), 0
    for _ in range(3 * times):  # some may end before they are killed
        process = server().Process(target=reproduced, args=(scratch / "killed",))
        process.start()
        process.join(seconds * moments.uniform(0, 0.9))
        process.kill()
        process.join()
        good += process.exitcode == -signal.SIGKILL and are_whole(scratch / "killed" / "out")
        if good == times:
            break
    assert run(reproduced, scratch / "killed") == 0
    one, other = (results_of(scratch / name / "out") for name in ("whole", "killed"))
    assert one == other
    return good


def are_whole(folder):
    """Whether every notebook, page, table and figure of a folder that has its final name is complete."""
    ends = {".html": b"</html>", ".svg": b"</svg>", ".pdf": b"%%EOF", ".png": b"IEND", ".csv": b"\n"}
    for path in folder.rglob("[!.]*.*"):
        if path.suffix == ".ipynb":
            assert "resnet_paths" in nbformat.read(path, as_version=4).metadata
        elif path.suffix in ends:
            assert ends[path.suffix] in path.read_bytes()[-12:], path
    return True


def results_of(folder):
    """Names of all files, bytes of tables and pictures, and sources and outputs of notebooks."""
    found = {str(path.relative_to(folder)): b"" for path in folder.rglob("[!.]*.*") if path.is_file()}
    for name in found:
        path = folder / name
        if path.suffix in (".csv", ".png"):
            found[name] = path.read_bytes()
        elif path.suffix == ".ipynb":
            cells = nbformat.read(path, as_version=4).cells
            found[name] = [(cell.source.replace(str(folder), ""), cell.get("outputs")) for cell in cells]
    return found


def images(number, seed):  # as in conftest.py
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (number,), generator=generator)
    noise = torch.randint(60, (number, 1, 28, 28), generator=generator)
    return ImageDataset("fashion-mnist", (noise + 20 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


def trained(folder, settings, snapshots=(), **options):
    options = {"accelerator": "cpu", "progress": False, "snapshots": snapshots, **options}
    train(settings, folder, train_set=images(40, 0), test_set=images(21, 1), **options)


def published(folder, weights):
    publish(weights, folder, test_set=images(21, 1))


def dying(moment, function, *arguments):
    """Call a function, and die at the call number `call` (from 1) of the step called `place`."""
    import safetensors.torch

    tqdm.set_lock(threading.RLock())  # its own between processes would be left behind by a kill
    place, call = moment
    calls = 0

    def dies(function, before):
        def step(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls < call:
                return function(*args, **kwargs)
            before(*args, **kwargs)
            return os.kill(os.getpid(), signal.SIGKILL)

        return step

    def half(tensors, path, metadata):
        save(tensors, path, metadata)
        with Path(path).open("r+b") as file:
            file.truncate(Path(path).stat().st_size // 2)

    save, replace, backward = safetensors.torch.save_file, Path.replace, torch.Tensor.backward
    if place == "half a file":
        safetensors.torch.save_file = dies(save, half)
    elif place == "before the rename":
        Path.replace = dies(replace, lambda *args: None)
    elif place == "after the rename":
        Path.replace = dies(replace, replace)
    elif place == "in a batch":
        torch.Tensor.backward = dies(backward, backward)
    function(*arguments)


if __name__ == "__main__":
    folder, settings, options = sys.argv[1:]
    trained(folder, TrainingSettings(**json.loads(settings)), **json.loads(options))

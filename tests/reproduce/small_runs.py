"""Small training runs: whether two are the same, and one in a process that kills itself, with no chance to clean up."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from resnet_paths.reproduce.datasets import ImageDataset
from resnet_paths.reproduce.training import TrainingSettings, train
from resnet_paths.zoo.weights import read_metadata, read_tensors


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


def start_training(folder, settings, place="never", call=0, **options):
    """Run in a new process on 40 images; kill it at the call number `call` (from 1) of the step called `place`."""
    command = [sys.executable, "-m", "tests.reproduce.small_runs", str(folder), place, str(call)]
    command += [json.dumps(dataclasses.asdict(settings)), json.dumps(options)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200)


def killed_and_resumed(folder, settings, moments):
    """Start a run again and again, each time killed at the next of `moments`, and once more to its end."""
    for place, call in moments:
        killed = start_training(folder, settings, place, call)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        for path in folder.glob("[!.]*.safetensors"):  # whatever carries a final name is whole
            read_tensors(path)
    finished = start_training(folder, settings)
    assert finished.returncode == 0, finished.stderr


def main(folder, place, call, settings, options):
    import safetensors.torch

    calls = 0

    def dies(function, before):
        def step(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls < int(call):
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

    def images(number, seed):  # as in conftest.py
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (number,), generator=generator)
        noise = torch.randint(60, (number, 1, 28, 28), generator=generator)
        return ImageDataset("fashion-mnist", (noise + 20 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)

    splits = {"train_set": images(40, 0), "test_set": images(21, 1)}
    options = {"accelerator": "cpu", "progress": False, **splits, **json.loads(options)}
    train(TrainingSettings(**json.loads(settings)), folder, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What lesion studies cost: ``python -m tests.benchmarks.lesions``.

Each ratio is measured side by side in one run, interleaved, on the same test images:

1. single deletions of all blocks against the loop that people write, which copies the model, cuts one block out and
   runs it on all images; in float32 as the model is, with channels last, and in bfloat16 with channels last;
2. the share of block evaluations that random deletions of 1 to 20 blocks save, against a count of distinct prefixes;
3. peak memory of 400 lesions against 40;
4. throughput of two Dask worker processes against one, one thread each (``pip install resnet-paths[cluster]``).
"""

from __future__ import annotations

import argparse
import copy
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import resnet_paths as rp
from resnet_paths.zoo import load_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="preact-resnet-110", help="a pre-activation ResNet of the project")
    parser.add_argument("--weights", help="a weights file instead of the shipped one")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["loop", "trie", "memory", "dask"])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = load_network(options.network, options.weights)
    chain = rp.unravel(model, torch.zeros(2, 1, 28, 28))
    if options.memory_of is not None:
        memory_of(chain, options.memory_of)
        return
    loader = images_of(options.images, options.batch)
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.network}, {len(chain)} blocks, {options.images} test images in batches of {options.batch}\n")
    if options.only in (None, "loop"):
        loop(model, chain, loader, options.repeats)
    if options.only in (None, "trie"):
        trie(chain)
    if options.only in (None, "memory"):
        memory(options)
    if options.only in (None, "dask"):
        dask(chain, options.repeats)


def images_of(count: int, batch: int) -> DataLoader:
    return DataLoader(Subset(rp.load_dataset("fashion-mnist", "test"), range(count)), batch_size=batch)


def processor() -> str:
    """Its name, and whether it has matrix units for bfloat16, without which bfloat16 is no faster."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    units = "with" if "amx_bf16" in text else "without"
    return f"{names[0] if names else platform.machine()} ({units} bfloat16 matrix units)"


class SkipAlone(nn.Module):
    """A pre-activation block of which only the skip is left, as one would write it by hand."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.block
        return x if block.projection is None else block.projection(torch.relu(block.bn1(x)))


def copy_and_run(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Predictions [block, image] of the loop over copies of the model."""
    predictions = []
    with torch.inference_mode():
        for stage in ("layer1", "layer2", "layer3"):
            for index in range(len(getattr(model, stage))):
                cut = copy.deepcopy(model)
                getattr(cut, stage)[index] = SkipAlone(getattr(cut, stage)[index])
                predictions.append(torch.cat([cut(images).argmax(1) for images, _ in batches]))
    return torch.stack(predictions)


def loop(model: nn.Module, chain: rp.ResidualChain, loader: DataLoader, repeats: int) -> None:
    batches = list(loader)
    labels = torch.cat([labels for _, labels in batches])
    plan = rp.single_deletions(chain)
    ways = {
        "float32": {},
        "float32, channels last": {"channels_last": True},
        "bfloat16, channels last": {"channels_last": True, "precision": "bfloat16"},
    }

    def naive() -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        wrong = (copy_and_run(model, batches) != labels).float().mean(1)
        return time.perf_counter() - start, wrong.numpy()

    def ours(options: dict) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        frame = rp.lesion_study(chain, batches, plan, progress=False, **options)
        return time.perf_counter() - start, frame["error_rate"].to_numpy()

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, np.ndarray] = {}
    of_naive: list[float] = []
    for _ in range(repeats):
        taken, expected = naive()
        of_naive.append(taken)
        for name, options in ways.items():
            taken, rates[name] = ours(options)
            seconds[name].append(taken)
    n = len(plan)
    print(f"1. single deletions of {n} blocks; copy-and-run loop {np.median(of_naive):.1f} s")
    print(f"   bound for shared prefixes: (n + 1) / 2n = {(n + 1) / (2 * n):.3f}; the intact network is run besides")
    for name in ways:
        ratios = sorted(a / b for a, b in zip(seconds[name], of_naive, strict=True))
        apart = np.abs(rates[name] - expected).max()
        print(f"   {name:24}: {np.median(ratios):.3f} of its time ({ratios[0]:.3f} to {ratios[-1]:.3f}), ", end="")
        print(f"{1 / np.median(ratios):.1f} times as fast; error rates within {100 * apart:.2f} points")
    print()


def trie(chain: rp.ResidualChain) -> None:
    """The trie's count of block evaluations against prefixes counted by hand."""
    plan = rp.random_deletions(chain, range(1, 21), 20, torch.Generator().manual_seed(0))
    frame = rp.lesion_study(chain, images_of(2, 2), plan, progress=False)
    kept = [range(len(chain)), *([i for i in range(len(chain)) if i not in lesion.blocks] for lesion in plan)]
    # A deleted block that changes the shape still runs its projection.
    projections = {i for i, block in enumerate(chain) if block.skip_kind != "identity"}
    paths = []
    for blocks, lesion in zip(kept, [(), *(lesion.blocks for lesion in plan)], strict=True):
        cut = projections & set(lesion)
        paths.append(sorted([(i, "whole") for i in blocks] + [(i, "skip") for i in cut]))
    prefixes = {tuple(path[: i + 1]) for path in paths for i in range(len(path))}
    one_by_one = sum(map(len, paths))
    counted = frame.attrs["block_evaluations"], frame.attrs["block_evaluations_one_by_one"]
    saved = 1 - counted[0] / counted[1]
    print(f"2. {len(plan)} random deletions of 1 to 20 blocks: {counted[0]} block evaluations of {counted[1]},")
    print(f"   {saved:.1%} saved; counted by hand {len(prefixes)} of {one_by_one}\n")
    assert counted == (len(prefixes), one_by_one)


def memory(options: argparse.Namespace) -> None:
    peaks = {}
    for count in (40, 400):
        command = [
            sys.executable, "-m", "tests.benchmarks.lesions", "--memory-of", str(count), "--network", options.network,
        ]  # fmt: skip
        command += ["--weights", options.weights] if options.weights else []
        peaks[count] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"3. peak memory, one batch of 100 images: {peaks[40]:.0f} MiB with 40 lesions, ", end="")
    print(f"{peaks[400]:.0f} MiB with 400: {peaks[400] / peaks[40]:.2f} times\n")


def memory_of(chain: rp.ResidualChain, count: int) -> None:
    plan = rp.random_deletions(chain, range(1, 21), count // 20, torch.Generator().manual_seed(0))
    rp.lesion_study(chain, images_of(100, 100), plan, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def dask(chain: rp.ResidualChain, repeats: int) -> None:
    """Two worker processes against one; both have the chain already, and a thread each."""
    from distributed import Client, LocalCluster

    loader, plan = images_of(500, 50), rp.single_deletions(chain)[::6]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    frames = []
    for _ in range(repeats):
        for workers in (1, 2):
            with (
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
                Client(cluster) as client,
            ):
                client.run(torch.set_num_threads, 1)
                rp.lesion_study(chain, images_of(100, 50), plan, executor=client.get_executor(), progress=False)
                start = time.perf_counter()
                frames.append(rp.lesion_study(chain, loader, plan, executor=client.get_executor(), progress=False))
                seconds[workers].append(time.perf_counter() - start)
    ratios = sorted(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    equal = all(frame.equals(frames[0]) for frame in frames)
    print(f"4. Dask, {len(plan)} deletions, 500 images, two workers against one, one thread each:")
    print(f"   {np.median(ratios):.2f} times as many images a second ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"   frames equal: {equal}")


if __name__ == "__main__":
    main()

"""What a study shares, what it holds in memory however many lesions it has, and what a second worker brings.

Dask's workers need ``pip install resnet-paths[cluster]``.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import resnet_paths as rp
from resnet_paths.zoo import load_network
from tests.benchmarks.lesions import fashion_images
from tests.benchmarks.table import ROOT, row

PART = "studies"


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of all three."""
    chain = chain_of(options.network)
    most, repeats = (4, 1) if options.quick else (20, 3)
    return [*sharing(chain, most), *memory(options.network, most), *dask(chain, repeats, options.quick)]


def chain_of(network: str) -> rp.ResidualChain:
    return rp.unravel(load_network(network).eval(), torch.zeros(2, 1, 28, 28))


def batches(count: int, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [fashion_images(i * size, size) for i in range(count)]


def random_deletions(chain: rp.ResidualChain, most: int, repeats: int) -> list[Any]:
    """Of 1 to `most` blocks, `repeats` of each."""
    return rp.random_deletions(chain, range(1, most + 1), repeats, torch.Generator().manual_seed(0))


def sharing(chain: rp.ResidualChain, most: int) -> list[dict[str, Any]]:
    """Block evaluations of random deletions: as a study counts them, and the distinct prefixes counted by hand."""
    plan = random_deletions(chain, most, 20)
    attrs = rp.lesion_study(chain, batches(1, 2), plan, progress=False).attrs
    counted = attrs["block_evaluations"], attrs["block_evaluations_naive"]
    by_hand = evaluations_by_hand(chain, [(), *(lesion.blocks for lesion in plan)])
    if counted != by_hand:
        raise AssertionError(f"the study counts {counted} block evaluations, by hand there are {by_hand}")
    task = f"{len(plan)} random deletions of 1 to {most} blocks, and the intact network"
    note = f"{1 - counted[0] / counted[1]:.1%} saved; {by_hand[0]} distinct prefixes counted by hand"
    return [
        row(PART, task, "this project", "block evaluations", counted[0], note=note),
        row(PART, task, "one lesion after the other", "block evaluations", counted[1]),
    ]


def evaluations_by_hand(chain: rp.ResidualChain, deleted: list[tuple[int, ...]]) -> tuple[int, int]:
    """Distinct prefixes of the lesioned networks, and their blocks one by one."""
    # A deleted block that changes the shape still runs its projection.
    projections = {i for i, block in enumerate(chain) if block.skip_kind != "identity"}
    networks = [
        [(i, i in blocks) for i in range(len(chain)) if i not in blocks or i in projections] for blocks in deleted
    ]
    return len({tuple(n[: i + 1]) for n in networks for i in range(len(n))}), sum(map(len, networks))


def memory(network: str, most: int) -> list[dict[str, Any]]:
    """Peaks of two fresh processes, one with ten times the lesions."""
    rows, peaks = [], {}
    for repeats in (2, 20):
        call = f"from tests.benchmarks.studies import peak; print(peak({network!r}, {most}, {repeats}))"
        command = [sys.executable, "-c", call]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peaks[repeats] = float(answer.stdout)
    task = "peak memory of a study, one batch of 100 images"
    for repeats, peak_mib in peaks.items():
        note = f"{peak_mib / peaks[2]:.3f} times that of {2 * most}" if repeats != 2 else ""
        rows.append(row(PART, task, f"{repeats * most} lesions", "MiB", peak_mib, note=note, memory=peak_mib))
    return rows


def peak(network: str, most: int, repeats: int) -> float:
    """Largest resident memory of this process, in MiB, after a study."""
    chain = chain_of(network)
    rp.lesion_study(chain, batches(1, 100), random_deletions(chain, most, repeats), progress=False)
    status = Path("/proc/self/status")  # its peak is this process's own; getrusage's begins with that of the parent
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def dask(chain: rp.ResidualChain, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Two worker processes against one, a thread each; all have the chain already."""
    task = "Dask: two worker processes against one, one thread each"
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        return [row(PART, task, "two workers", "images a second", note="distributed is not installed")]
    images, plan = batches(2 if quick else 20, 50), rp.single_deletions(chain)[::6]
    rates: dict[int, list[float]] = {1: [], 2: []}
    frames = []
    for _ in range(repeats):
        for workers in rates:
            with (
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
                Client(cluster) as client,
            ):
                client.run(torch.set_num_threads, 1)
                study = {"executor": client.get_executor(), "progress": False}
                rp.lesion_study(chain, images[:2], plan, **study)
                start = time.perf_counter()
                frames.append(rp.lesion_study(chain, images, plan, **study))
                rates[workers].append(50 * len(images) / (time.perf_counter() - start))
    if not all(frame.equals(frames[0]) for frame in frames):
        raise AssertionError("frames of one and of two workers differ")
    gains = sorted(two / one for one, two in zip(rates[1], rates[2], strict=True))
    note = f"{gains[len(gains) // 2]:.2f} times as many ({gains[0]:.2f} to {gains[-1]:.2f}); the same frame"
    return [
        row(PART, task, "one worker", "images a second", rates[1]),
        row(PART, task, "two workers", "images a second", rates[2], note=note),
    ]

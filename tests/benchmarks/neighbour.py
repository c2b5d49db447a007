"""A notebook cell beside a busy process, with threads that spin or sleep: ``python -m tests.benchmarks.neighbour``.

The cell is a small lesion study on all cores, in a fresh process each time, since OpenMP reads the policy at its start;
its imports do not count. The busy process takes one core. All four combinations run in turns, and one table is printed.
At most ten minutes, one on a quiet machine. On a machine that is not quiet, only ratios of one repeat count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import resnet_paths as rp
from tests.benchmarks import table
from tests.benchmarks.studies import batches, chain_of
from tests.benchmarks.table import ROOT, row

PART = "neighbour"
LIMIT = 30.0
"""Seconds after which a process is stopped."""
POLICIES = {"threads that spin, the default": None, "threads that sleep, OMP_WAIT_POLICY=PASSIVE": "PASSIVE"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.neighbour", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    rows = measured(lambda policy: seconds_in_a_process(policy, options.threads), options.repeats)
    print(table.text(table.stamped(rows, {"torch": torch.__version__}, options.threads)))


def measured(seconds_of: Callable[[str | None], float], repeats: int) -> list[dict[str, Any]]:
    """Rows of what `seconds_of` a policy returns, quiet and beside a busy process; ratios are to the first row."""
    surroundings = {"quiet": contextlib.nullcontext, "beside a busy process": busy_process}
    seconds: dict[tuple[str, str], list[float]] = {(place, name): [] for place in surroundings for name in POLICIES}
    for _ in range(repeats):
        for place, surrounding in surroundings.items():
            with surrounding():
                for name, policy in POLICIES.items():
                    seconds[place, name].append(seconds_of(policy))
    first = next(iter(seconds.values()))
    return [
        row(
            PART,
            "a small study; ratios are to the first row",
            f"{place}, {name}",
            "seconds",
            found,
            [a / b for a, b in zip(found, first, strict=True)],
            note=f"stopped at {LIMIT:g} s: takes longer" if max(found) >= LIMIT else "",
        )
        for (place, name), found in seconds.items()
    ]


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes one core until the block ends."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def environment(policy: str | None, threads: int) -> dict[str, str]:
    """Of a process with this policy; None for OpenMP's default."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    chosen = {} if policy is None else {"OMP_WAIT_POLICY": policy}
    return kept | chosen | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


def seconds_in_a_process(policy: str | None, threads: int) -> float:
    """Of the study, without what the process needs to start."""
    call = "from tests.benchmarks.neighbour import study; print(study())"
    command, given = [sys.executable, "-c", call], environment(policy, threads)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=given, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return LIMIT
    return float(answer.stdout)


def study() -> float:
    """Seconds of a study of single deletions in this process, after one batch that does not count."""
    chain = chain_of("preact-resnet-20")
    plan = rp.single_deletions(chain)
    rp.lesion_study(chain, batches(1, 10), plan, progress=False)
    start = time.perf_counter()
    rp.lesion_study(chain, batches(4, 25), plan, progress=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

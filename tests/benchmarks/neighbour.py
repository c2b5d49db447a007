"""A notebook cell beside a busy process, by number of threads and by how they wait.

The cell is a small lesion study. For each way there is a process, since libgomp reads the environment at its start; all
are started first, and then the study runs in each of them in turn, first with nothing beside it, then with a process
that takes one core. Every repeat goes through the ways in the other direction. What counts is the median of the ratios
to the default within one repeat, so that other work on the machine does not decide.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import resnet_paths as rp
from resnet_paths.reproduce.kernels import idle_threads
from tests.benchmarks.studies import batches, chain_of
from tests.benchmarks.table import row
from tests.benchmarks.workers import workers

PART = "neighbour"
TASK = "a small study; ratios are to the first row, within one repeat"
QUIET, BESIDE = "quiet", "beside a busy process"


@dataclass(frozen=True)
class Contender:
    """A way in which threads wait.

    Attributes:
        environment: What OpenMP reads at its start.
        threads: How many there are, from the number that was asked for; evaluated before each study.
    """

    environment: dict[str, str] = field(default_factory=dict)
    threads: Callable[[int], int] = lambda asked_for: asked_for

    def prepare(self, settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        run = study(settings["images"])

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            torch.set_num_threads(settings["threads"])
            torch.set_num_threads(self.threads(settings["threads"]))
            return {"seconds": run()}

        return answer


DEFAULT = "threads that spin for some 3 ms, the default"
CONTENDERS = {
    DEFAULT: Contender(),
    "threads that sleep at once, OMP_WAIT_POLICY=PASSIVE": Contender({"OMP_WAIT_POLICY": "PASSIVE"}),
    **{
        f"threads that spin for some {ms} ms, GOMP_SPINCOUNT={count}": Contender({"GOMP_SPINCOUNT": str(count)})
        for ms, count in ((0.01, 1_000), (0.1, 10_000))
    },
    "kernels of reproduce, a thread for each idle core": Contender(threads=lambda asked_for: idle_threads()),
    "one thread": Contender(threads=lambda asked_for: 1),
}
"""The default is the first. libgomp reckons with 100,000 spins a millisecond."""


def run(options: Any) -> list[dict[str, Any]]:
    """Rows of every way, quiet and beside a busy process."""
    settings = {"threads": options.threads, "images": 25 if options.quick else 100}
    with workers(
        PART,
        dict.fromkeys(CONTENDERS, sys.executable),
        settings,
        {name: contender.environment for name, contender in CONTENDERS.items()},
    ) as running:
        by_name = {worker.contender: worker for worker in running}

        def seconds_of(name: str) -> float:
            answer = by_name[name].ask()
            if answer is None:
                raise RuntimeError(f"{name}: {by_name[name].reason}")
            return float(answer["seconds"])

        return measured(seconds_of, 2 if options.quick else 9)


def measured(seconds_of: Callable[[str], float], repeats: int) -> list[dict[str, Any]]:
    """Rows of what `seconds_of` a contender returns, quiet and beside a busy process.

    Args:
        seconds_of: From a name in `CONTENDERS` to the seconds of one study.
        repeats: How often each is measured, the first time, which does not count, aside.

    Returns:
        One row for each; the note has the ratio to the default beside the same neighbour.
    """
    seconds: dict[tuple[str, str], list[float]] = {
        (place, name): [] for place in (QUIET, BESIDE) for name in CONTENDERS
    }
    for name in CONTENDERS:
        seconds_of(name)
    for repeat in range(repeats):
        names = list(CONTENDERS)[:: -1 if repeat % 2 else 1]
        for place, surrounding in ((QUIET, contextlib.nullcontext), (BESIDE, busy_process)):
            with surrounding():
                for name in names:
                    seconds[place, name].append(seconds_of(name))
    first = seconds[QUIET, DEFAULT]
    rows = []
    for (place, name), found in seconds.items():
        beside = statistics.median(a / b for a, b in zip(found, seconds[place, DEFAULT], strict=True))
        note = f"{beside:.2f} times the default, {place}" if name != DEFAULT else ""
        ratios = [a / b for a, b in zip(found, first, strict=True)]
        rows.append(row(PART, TASK, f"{place}, {name}", "seconds", found, ratios, note=note))
    return rows


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes one core until the block ends."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def study(images: int) -> Callable[[], float]:
    """A function that runs a study of single deletions in this process and returns its seconds."""
    chain = chain_of("preact-resnet-20")
    plan, given = rp.single_deletions(chain), batches(images // 25, 25)

    def run() -> float:
        start = time.perf_counter()
        rp.lesion_study(chain, given, plan, progress=False)
        return time.perf_counter() - start

    return run

"""A process for each contender, run in turns: what disturbs one disturbs its neighbours in time as well.

Some libraries change torch when they are imported, so they must not share a process. While one works the others wait,
and take no processor time. Each reports its own peak of memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.table import ROOT

Prepare = Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]
"""From settings to a function that takes a request, measures, and answers; what it prepares is not measured."""


class Worker:
    """A contender in its own process.

    Args:
        part: Module of `tests.benchmarks` whose ``CONTENDERS`` hold it.
        contender: Its name there.
        settings: What its preparation is given; JSON-able.
        python: The interpreter.
        waiting: What OpenMP reads at its start on how threads wait; None for what is set already.
    """

    def __init__(
        self,
        part: str,
        contender: str,
        settings: dict[str, Any],
        python: str | Path = sys.executable,
        waiting: dict[str, str] | None = None,
    ):
        self.contender = contender
        self.reason = ""
        self._process = subprocess.Popen(
            [str(python), "-m", "tests.benchmarks.workers", part, contender, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment(waiting) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(settings["threads"])},
        )
        self._read()

    def ask(self, **request: Any) -> dict[str, Any] | None:
        """Its answer; None once it has failed, and then `reason` says why."""
        if self.reason:
            return None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with status {self._process.wait()}"}
        self.reason = answer.get("error", "")
        return None if self.reason else answer


def environment(waiting: dict[str, str] | None) -> dict[str, str]:
    """That of this process, with another way for threads to wait; None for the one that is set."""
    kept = dict(os.environ)
    for name in () if waiting is None else ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        kept.pop(name, None)
    return kept | (waiting or {})


@contextlib.contextmanager
def workers(
    part: str,
    contenders: dict[str, str | Path],
    settings: dict[str, Any],
    waiting: dict[str, dict[str, str]] | None = None,
) -> Iterator[list[Worker]]:
    """Workers by name, each with its interpreter and perhaps its way to wait; they end when the block does."""
    made = []
    try:
        for name, python in contenders.items():
            how = None if waiting is None else waiting[name]
            made.append(Worker(part, name, settings, python, how))  # one after the other: each prepares alone
        yield made
    finally:
        for worker in made:
            worker.close()


def peak_memory_since_reset() -> float:
    """Most memory that this process held at once since `reset_peak_memory`, in MiB; since its start where unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return float(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> float:
    """Forget the peak so far, where the system can; MiB held now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_since_reset()


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, MiB held at most beyond what was held before, and what `work` returned.

    What was freed before goes back to the system first, where it can: else work that fits into it would seem to need
    no memory.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # as on other systems than Linux with glibc
        ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak_memory()
    start = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - start
    return seconds, peak_memory_since_reset() - before, value


def main() -> None:
    """Prepare, say so, and then answer a line of JSON with a line of JSON."""
    part, contender, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        import torch

        torch.set_num_threads(settings["threads"])
        measure = importlib.import_module(f"tests.benchmarks.{part}").CONTENDERS[contender].prepare(settings)
        say({})
        for line in sys.stdin:
            say(measure(json.loads(line)))
    except Exception as error:
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]})


if __name__ == "__main__":
    main()

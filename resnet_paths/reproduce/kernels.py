"""The environment of the kernels in which notebooks are executed: how many threads, and how they wait."""

from __future__ import annotations

import os

import torch

from resnet_paths._utils.errors import requires_extra

with requires_extra("notebooks"):
    import psutil

__all__ = ["WAITING", "idle_threads", "kernel_environment"]

WAITING = {"GOMP_SPINCOUNT": "1000"}
"""How threads of a kernel wait at the barrier after each parallel loop: they spin for some 0.01 ms and then sleep.

By default libgomp's threads spin for some 3 ms, as long as a time slice of the scheduler. Where another process
occupies a core, they spin while the last thread waits for that very core. Threads that sleep at once (OMP_WAIT_POLICY
PASSIVE) leave the core, but have to be woken for every loop, of which a small network has thousands a second. libgomp
reads this when it is loaded; other OpenMP libraries ignore it. The part "neighbour" of `tests.benchmarks` compares the
choices.
"""


def kernel_environment() -> dict[str, str]:
    """Environment of a kernel that is started now: the user's own, with `WAITING` and `idle_threads`.

    Both are left as they are where the user has set a variable that says otherwise.

    Returns:
        All environment variables.
    """
    chosen = dict(os.environ)
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        chosen |= WAITING
    if not any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        chosen["OMP_NUM_THREADS"] = str(idle_threads())
    return chosen


def idle_threads(seconds: float = 0.5) -> int:
    """Number of threads that run without waiting for other processes.

    Every parallel loop ends with its last thread: one that shares its core with another process takes twice as long, so
    that a thread for each idle core is faster than a thread for each core.

    Args:
        seconds: How long other processes are observed.

    Returns:
        At least 1, and at most as many as torch has in this process.
    """
    percent: list[float] = psutil.cpu_percent(interval=seconds, percpu=True)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(len(percent)))
    busy = round(sum(percent[cpu] for cpu in usable if cpu < len(percent)) / 100)
    return max(1, min(torch.get_num_threads(), len(usable) - busy))

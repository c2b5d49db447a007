"""The environment of the kernels in which notebooks are executed."""

from __future__ import annotations

import os

import torch

from resnet_paths._utils.errors import requires_extra

with requires_extra("notebooks"):
    import psutil

__all__ = ["idle_threads", "kernel_environment"]


def kernel_environment() -> dict[str, str]:
    """Environment of a kernel that is started now: the user's own, with a thread for each idle processor.

    Returns:
        All environment variables. The number of threads is left as it is where the user has set it.
    """
    chosen = dict(os.environ)
    if not any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        chosen["OMP_NUM_THREADS"] = str(idle_threads())
    return chosen


def idle_threads(seconds: float = 0.5) -> int:
    """Number of threads that run without waiting for other processes.

    A parallel loop ends with its last thread. Where another process occupies a core, the threads that are done spin, on
    the core for which the last one waits; a small network has thousands of such loops a second. So a thread for each
    idle core is faster than one for each core. ``python -m tests.benchmarks --only neighbour`` compares the choices.

    Args:
        seconds: How long other processes are observed.

    Returns:
        At least 1, and at most as many as torch has in this process.
    """
    percent: list[float] = psutil.cpu_percent(interval=seconds, percpu=True)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(len(percent)))
    busy = round(sum(percent[cpu] for cpu in usable if cpu < len(percent)) / 100)
    return max(1, min(torch.get_num_threads(), len(usable) - busy))

"""Processes in which torch and the helpers of the tests are imported already; they can be killed by the dozen."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver


@functools.cache
def server():
    """A context whose processes are forks of one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.lesions.killed_studies", "tests.reproduce.small_runs", "lightning_fabric"])
    return context


@contextlib.contextmanager
def dask_client():
    """Client of a cluster of two Dask workers, which are such processes too."""
    import dask
    import distributed

    server()
    multiprocessing.forkserver.ensure_running()  # before distributed replaces what is imported in it
    options = {"distributed.worker.multiprocessing-method": "forkserver"}
    with (
        dask.config.set(options),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def run(function, *arguments, timeout=200):
    """The exit status of a function in such a process; negative if it was killed."""
    process = server().Process(target=function, args=arguments)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{function.__name__} takes more than {timeout} s")
    return process.exitcode

"""Studies whose driver, or one of whose Dask workers, is killed in the middle: nothing is lost, repeated or changed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from resnet_paths.core.chain import ResidualChain
from tests.chains import random_chain
from tests.lesions.test_lesion_options import study
from tests.lesions.test_lesions import STEADY, labelled
from tests.processes import dask_client, run, server


class Paused(nn.Module):
    """A stem that takes its time."""

    def __init__(self, part, seconds):
        super().__init__()
        self.part, self.seconds = part, seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.part(x)


def paused_chain(seconds=0.004):
    chain = random_chain(STEADY)
    return ResidualChain(Paused(chain.stem, seconds), chain, chain.head).eval()


def parts(folder):
    return sorted(Path(folder).glob("*/[!.]*.safetensors"))


def looks_of(folder):
    """Each part with what would change if it were written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in parts(folder)}


def counts(frame):
    return frame.attrs["batches_computed"], frame.attrs["batches_found"]


def in_a_process(folder, num_batches, result):
    """A study with a store, once a file says so; its writes are slow, so that some are killed as they write."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own between processes would be left behind by a kill
    while not folder.with_suffix(".go").exists():
        time.sleep(0.001)
    sync = os.fsync
    os.fsync = lambda handle: (time.sleep(0.002), sync(handle))[1]
    study(paused_chain(), labelled(8 * num_batches), store=folder).to_pickle(result)


def kill_drivers(times, scratch):
    """Kill a study again and again, each time later than the last time; then let it end.

    Returns:
        How many kills left all finished parts as they were, if the frame in the end is that of a study without a store.
    """
    num_batches = 8 * times
    folder, result, moments = scratch / "store", scratch / "result", random.Random(0)
    folder.with_suffix(".go").touch()
    kept, good = {}, 0
    for _ in range(times):
        process = server().Process(target=in_a_process, args=(folder, num_batches, result))
        process.start()
        deadline = time.monotonic() + 60
        while len(parts(folder)) == len(kept) and time.monotonic() < deadline:  # until it has got somewhere
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join(60)
        now = looks_of(folder)
        good += process.exitcode == -signal.SIGKILL and now.items() >= kept.items() and len(now) > len(kept)
        kept = now
    assert run(in_a_process, folder, num_batches, result) == 0
    frame = pd.read_pickle(result)
    assert counts(frame) == (num_batches - len(kept), len(kept))
    assert len(parts(folder)) == num_batches
    assert looks_of(folder).items() >= kept.items()
    pd.testing.assert_frame_equal(frame, study(random_chain(STEADY), labelled(8 * num_batches)))
    return good


def kill_dask_workers(times, _scratch=None):
    """Studies on two Dask workers, one of which is killed in each.

    Returns:
        How many of them have the frame of a study without an executor.
    """
    chain, loader, moments = paused_chain(0.02), labelled(128), random.Random(0)
    plain, good = study(random_chain(STEADY), loader), 0
    for _ in range(times):
        with dask_client() as client:  # a cluster for each kill: the replacement of a worker may take long to start
            pid, moment, killed = moments.choice(list(client.run(os.getpid).values())), moments.randrange(4, 14), []

            def until_killed(pid=pid, moment=moment, killed=killed):
                for number, batch in enumerate(loader):
                    if number == moment:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                    yield batch

            frame = study(chain, until_killed(), executor=client.get_executor())
            good += frame.equals(plain) and killed == [pid]
    return good

"""Studies on executors: the same frame bit for bit, the chain sent once, workers that die, pieces that fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import types
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from pathlib import Path

import pandas as pd
import pytest
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from tests.chains import inputs, random_chain, random_model
from tests.lesions.killed_studies import counts, parts
from tests.lesions.test_lesion_options import norm_chain, study
from tests.lesions.test_lesions import STEADY, labelled
from tests.processes import dask_client, server

same = pd.testing.assert_frame_equal
UNPICKLED = []


class Noted(nn.Module):
    """A stem that notes in each process how often it is unpickled there, in a file where it is given one."""

    def __init__(self, part, log=None, pause=0.0):
        super().__init__()
        self.part, self.log, self.pause = part, log, pause

    def forward(self, x):
        time.sleep(self.pause)
        return self.part(x)

    def __setstate__(self, state):
        super().__setstate__(state)
        UNPICKLED.append(os.getpid())
        if self.log is not None:
            with Path(self.log).open("a") as log:
                log.write(f"{os.getpid()}\n")


class Deadly(nn.Module):
    """A stem that kills its process where the first feature is large, as long as a file is there."""

    def __init__(self, part, file):
        super().__init__()
        self.part, self.file = part, file

    def forward(self, x):
        if x[0, 0] > 90 and Path(self.file).exists():
            time.sleep(0.3)  # so that the other process finishes its piece
            os.kill(os.getpid(), signal.SIGKILL)
        return self.part(x)


def with_stem(stem):
    chain = random_chain(STEADY)
    return ResidualChain(stem(chain.stem), chain, chain.head).eval()


class InTurn(Executor):
    """Does each piece as it is handed in."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class LastFirst(Executor):
    """Does the latest piece first, on a thread, and notes how many wait at once."""

    def __init__(self, max_workers):
        self._max_workers = max_workers
        self.waiting, self.most, self.order = [], 0, []
        self.ended = False
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        with self.lock:
            self.waiting.append((future, lambda: fn(*args, **kwargs)))
            self.most = max(self.most, len(self.waiting))
        return future

    def _work(self):
        while not self.ended:
            time.sleep(0.002)
            with self.lock:
                future, task = self.waiting[-1] if self.waiting else (None, None)
            if future is not None:
                if future.set_running_or_notify_cancel():
                    future.set_result(task())
                with self.lock:
                    self.order.append(future)
                    self.waiting.remove((future, task))

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.ended = True
        self.thread.join()


def test_any_executor_gives_the_same_frame(tmp_path):
    loader, lesions = labelled(100), rp.pair_deletions(random_chain(STEADY), [0, 2, 5])
    plain = study(random_chain(STEADY), loader, lesions, per_class=True)
    for executor in (InTurn(), ThreadPoolExecutor(3), LastFirst(2)):
        with executor:
            same(study(random_chain(STEADY), loader, lesions, per_class=True, executor=executor), plain)
            store = tmp_path / type(executor).__name__
            for computed in (13, 0):
                frame = study(random_chain(STEADY), loader, lesions, per_class=True, executor=executor, store=store)
                same(frame, plain)
                assert counts(frame) == (computed, 13 - computed)


@pytest.mark.parametrize("workers", [1, 3])
def test_at_most_two_pieces_wait_for_each_worker(workers):
    with LastFirst(workers) as executor:
        read = []

        def batches():
            for number, batch in enumerate(labelled(200)):
                read.append(number - len(executor.order))
                yield batch

        same(study(random_chain(STEADY), batches(), executor=executor), study(random_chain(STEADY), labelled(200)))
    assert executor.most <= 2 * workers
    assert max(read) <= 2 * workers  # nor are more batches held in memory


def test_options_travel_along():
    loader, batches = labelled(40), [inputs(30), inputs(20, 5)]
    for options in ({"reestimate_batchnorm": batches}, {"precision": "float32"}, {"batch_budget": 3}):
        plain = study(norm_chain(), loader, **options)
        with ThreadPoolExecutor(2) as executor:
            same(study(norm_chain(), loader, executor=executor, **options), plain)


def test_a_piece_that_fails_fails_the_study(tmp_path):
    batches = list(labelled(80))
    x, y = batches[3]
    batches[3] = (x, y + 7)
    for executor in (InTurn(), ThreadPoolExecutor(2)):
        store = tmp_path / type(executor).__name__
        with executor, pytest.raises(rp.ResnetPathsError, match=r"labels: got \[7, 9\]; allowed: class indices from 0"):
            study(random_chain(STEADY), batches, executor=executor, store=store)
        assert len(parts(store)) >= 2  # those before it are kept; one may still be running


class Failing(Executor):
    """Finishes one piece well and one badly at the same moment."""

    _max_workers = 2

    def __init__(self, error):
        self.error, self.waiting = error, []

    def submit(self, fn, /, *args, **kwargs):
        self.waiting.append((Future(), lambda: fn(*args, **kwargs)))
        if len(self.waiting) == 4:  # before anybody waits for them
            (bad, _), *_ = self.waiting
            bad.set_exception(self.error)
            for future, task in self.waiting[1:3]:
                future.set_result(task())
        return self.waiting[-1][0]


def test_what_was_finished_with_a_piece_that_failed_is_kept(tmp_path):
    executor = Failing(rp.ResnetPathsError("labels", 7, "less"))
    with pytest.raises(rp.ResnetPathsError, match="labels: got 7"):
        study(random_chain(STEADY), labelled(80), executor=executor, store=tmp_path)
    assert len(parts(tmp_path)) == 2
    assert executor.waiting[3][0].cancelled()
    # The pieces that are there are not handed in again.
    assert counts(study(random_chain(STEADY), labelled(80), store=tmp_path)) == (8, 2)


def test_an_executor_that_gives_up_is_named():
    for error in (CancelledError(), BrokenExecutor("no more")):
        with pytest.raises(
            rp.ResnetPathsError, match=rf"executor: got '{type(error).__name__}: .*; allowed: an executor"
        ):
            study(random_chain(STEADY), labelled(80), executor=Failing(error))


@pytest.mark.parametrize("error", [RuntimeError("broken by hand"), AttributeError("no attribute 'x'"), TypeError("no")])
def test_errors_that_are_about_something_else_are_passed_on(error):
    with pytest.raises(type(error), match=str(error)):
        study(random_chain(STEADY), labelled(80), executor=Failing(error))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_processes_unpickle_the_chain_once(method, tmp_path):
    log = tmp_path / "log"
    chain, loader = with_stem(lambda stem: Noted(stem, log)), labelled(100)
    plain = study(chain, loader)
    context = server() if method == "forkserver" else multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        same(study(chain, loader, executor=executor), plain)
        pids = log.read_text().split()
        assert len(set(pids)) == len(pids) <= 2
        assert str(os.getpid()) not in pids
        # Exported chains, and errors of a piece.
        exported = rp.unravel(random_model(STEADY), inputs())
        same(study(exported, loader, executor=executor), study(exported, loader))
        with pytest.raises(rp.ResnetPathsError, match=r"labels: got \[5, 7\]; allowed: class indices from 0 to 2"):
            study(chain, [(x, y + 5) for x, y in loader], executor=executor)
        # What cannot be sent.
        local = with_stem(lambda stem: nn.Sequential(stem, Local()))
        with pytest.raises(
            rp.ResnetPathsError, match=r"executor: .*pickle.*; allowed: a chain and measures that can be sent.*Thread"
        ):
            study(local, loader, executor=executor)
    with ThreadPoolExecutor(2) as executor:
        same(study(local, loader, executor=executor), study(local, loader))


class Local(nn.Module):
    """Holds what cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.function = lambda x: x

    def forward(self, x):
        return self.function(x)


@pytest.mark.slow
def test_a_pool_that_breaks_keeps_what_was_finished(tmp_path):
    file = tmp_path / "deadly"
    file.touch()
    chain, batches = with_stem(lambda stem: Deadly(stem, file)), [(x.clone(), y) for x, y in labelled(80)]
    batches[6][0][0, 0] = 99
    store = tmp_path / "store"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as executor:
        broken = r"executor: got 'BrokenProcessPool.*; allowed: an executor whose workers live.*make a new executor"
        with pytest.raises(rp.ResnetPathsError, match=broken):
            study(chain, batches, executor=executor, store=store)
        kept = len(parts(store))
        assert 5 <= kept < 10
        with pytest.raises(rp.ResnetPathsError, match=broken):  # it stays broken
            study(chain, batches, executor=executor, store=store)
    file.unlink()
    frame = study(chain, batches, store=store)
    assert counts(frame) == (10 - kept, kept)
    same(frame, study(chain, batches))


def unpickled():
    """How often this process has unpickled a `Noted`."""
    from tests.lesions import test_lesion_executors

    return len(test_lesion_executors.UNPICKLED)


@pytest.mark.slow
def test_dask_sends_the_chain_to_each_worker_once(tmp_path):
    distributed = pytest.importorskip("distributed")
    chain, loader = with_stem(Noted), labelled(200)
    plain = study(chain, loader)
    with dask_client() as client:
        executor = client.get_executor()
        same(study(chain, loader, executor=executor), plain)
        assert list(client.run(unpickled).values()) in ([1, 1], [1, 0], [0, 1])
        same(study(chain, loader, executor=executor, store=tmp_path), plain)  # another study: sent once more
        assert max(client.run(unpickled).values()) <= 2
        exported = rp.unravel(random_model(STEADY), inputs())
        same(study(exported, loader, executor=executor), study(exported, loader))
        with pytest.raises(rp.ResnetPathsError, match=r"labels: got \[5, 7\]"):
            study(chain, [(x, y + 5) for x, y in loader], executor=executor)
        with pytest.raises(rp.ResnetPathsError, match=r"executor: .*pickle.*; allowed: a chain and measures that can"):
            study(with_stem(lambda stem: nn.Sequential(stem, Local())), loader, executor=executor)

        # Dask gives a piece up that killed one worker after the other.
        gives_up = distributed.KilledWorker("run_piece", types.SimpleNamespace(address="tcp://127.0.0.1:1"), 3)
        with pytest.raises(rp.ResnetPathsError, match=r"executor: got .*KilledWorker: .*allowed: an executor whose"):
            study(chain, loader, executor=Failing(gives_up))

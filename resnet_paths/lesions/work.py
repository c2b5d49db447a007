"""All batches of a study turned into pieces: here or by an executor, and not again what the store has.

Nothing here schedules: batches are handed to the executor in order, at most two for each of its workers at a time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.inputs import unpack
from resnet_paths.lesions.pieces import Piece, Workshop, hand_out, num_workers, run_piece
from resnet_paths.lesions.store import Store

__all__ = ["Shelf", "Work"]


@dataclass
class Shelf:
    """A store, and the keys of this study's lesions in it."""

    store: Store
    lesions: list[str]


@dataclass(frozen=True)
class _Job:
    """What is known of a batch, and what was asked for."""

    number: int
    inputs: Any
    labels: torch.Tensor
    batch: str
    known: dict[int, Piece]
    missing: list[int]


class Work:
    """Batches turned into pieces, those on the shelf taken from there."""

    def __init__(self, workshop: Workshop, shelf: Shelf | None, executor: Executor | None) -> None:
        self.workshop = workshop
        self.shelf = shelf
        self.executor = executor
        self.num_computed = 0
        self.num_found = 0

    def finished(self, loader: Iterable[Any]) -> Iterator[tuple[int, np.ndarray[Any, Any], Piece]]:
        """(Number, labels, piece of all lesions) of each batch, as they are finished."""
        batches = (unpack(batch) for batch in loader)
        filled = (batch for batch in batches if batch[1].numel())
        jobs = (self._job(number, inputs, labels) for number, (inputs, labels) in enumerate(filled))
        done = self._run_here(jobs) if self.executor is None else self._run_on(self.executor, jobs)
        for job, piece in done:
            if piece is not None and self.shelf is not None:
                # On the disk before anyone hears of it.
                self.shelf.store.write(job.batch, [self.shelf.lesions[i] for i in job.missing], piece)
            yield job.number, job.labels.cpu().numpy(), self._joined(job, piece)

    def _job(self, number: int, inputs: Any, labels: torch.Tensor) -> _Job:
        everything = range(self.workshop.trie.num_chains)
        if self.shelf is None:
            return _Job(number, inputs, labels, "", {}, list(everything))
        batch = Store.batch_key(inputs, labels)
        pieces = self.shelf.store.read(batch, self.shelf.lesions)
        known = {i: pieces[self.shelf.lesions[i]] for i in everything if self.shelf.lesions[i] in pieces}
        # Lesions that come to the same network are computed once.
        missing = list({self.shelf.lesions[i]: i for i in reversed(everything) if i not in known}.values())[::-1]
        return _Job(number, inputs, labels, batch, known, missing)

    def _run_here(self, jobs: Iterable[_Job]) -> Iterator[tuple[_Job, Piece | None]]:
        for job in jobs:
            yield job, self.workshop.run(job.inputs, job.labels, job.missing) if job.missing else None

    def _run_on(self, executor: Executor, jobs: Iterable[_Job]) -> Iterator[tuple[_Job, Piece | None]]:
        with _refusing_what_cannot_be_sent():
            handed_out = hand_out(executor, self.workshop)
        # Enough to keep all workers busy, and no more: the data may be larger than memory.
        most = 2 * num_workers(executor)
        pending: dict[Future[Piece], _Job] = {}

        def wait(until: int) -> Iterator[tuple[_Job, Piece]]:
            while len(pending) > until:
                done = concurrent.futures.wait(pending, return_when="FIRST_COMPLETED").done
                # Those that failed come last, so that no finished piece is lost.
                for future in sorted(done, key=lambda f: (_failed(f), pending[f].number)):
                    yield pending.pop(future), _result_of(future)

        try:
            for job in jobs:
                if not job.missing:
                    yield job, None
                    continue
                with _refusing_broken_executor():
                    future = executor.submit(run_piece, handed_out, job.inputs, job.labels, job.missing)
                pending[future] = job
                yield from wait(until=most - 1)
            yield from wait(until=0)
        finally:
            for future in pending:
                future.cancel()

    def _joined(self, job: _Job, piece: Piece | None) -> Piece:
        """Rows of all lesions in order: those that were known, those that were computed, and those equal to one."""
        self.num_found += piece is None
        self.num_computed += piece is not None
        rows = dict(job.known)
        if piece is not None:
            rows |= {index: piece.row(row) for row, index in enumerate(job.missing)}
        if self.shelf is not None:
            same = {self.shelf.lesions[index]: one for index, one in rows.items()}
            rows = {index: same[key] for index, key in enumerate(self.shelf.lesions)}
        return Piece.joined([rows[index] for index in range(self.workshop.trie.num_chains)])


@contextlib.contextmanager
def _refusing_broken_executor() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        of_executor = isinstance(error, concurrent.futures.BrokenExecutor | concurrent.futures.CancelledError)
        if not of_executor and type(error).__module__.split(".")[0] != "distributed":
            raise
        raise ResnetPathsError(
            "executor",
            f"{type(error).__name__}: {error}",
            "an executor whose workers live",
            "Finished pieces are kept where there is a store: make a new executor and run the study again.",
        ) from error


@contextlib.contextmanager
def _refusing_what_cannot_be_sent() -> Iterator[None]:
    try:
        yield
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        if "pickle" not in str(error) and "Can't get" not in str(error):
            raise
        raise ResnetPathsError(
            "executor",
            str(error),
            "a chain that can be sent to another process",
            "Define its modules at the top of a file, not inside a function, or use a ThreadPoolExecutor.",
        ) from error


def _failed(future: Future[Piece]) -> bool:
    return future.cancelled() or future.exception() is not None


def _result_of(future: Future[Piece]) -> Piece:
    with _refusing_broken_executor(), _refusing_what_cannot_be_sent():
        return future.result()

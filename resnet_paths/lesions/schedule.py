"""The batches of a study, run here or by an executor, except what the store has.

Batches are handed to the executor in order, at most two for each of its workers at a time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future

import torch

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.inputs import Inputs, each_tensor, num_examples, unpack, unpack_optional
from resnet_paths.lesions.keys import completed_keys
from resnet_paths.lesions.results import Sums, joined, rows_of
from resnet_paths.lesions.runner import Runner, num_workers, run_batch, shared_with_workers
from resnet_paths.lesions.store import Store

__all__ = ["Finished", "finished_batches"]

Finished = tuple[int, torch.Tensor | None, Sums, bool]
"""What `finished_batches` yields."""
_Job = tuple[tuple[Inputs, torch.Tensor | None, list[int]], Callable[[Sums | None], Finished]]
"""Arguments of `Runner.run`, and what is done with its result, or with None where nothing is missing."""


def finished_batches(
    runner: Runner,
    loader: Iterable[object],
    *,
    store: Store | None,
    keys: tuple[Sequence[str], Sequence[int]],
    executor: Executor | None,
    wanted: Sequence[int],
    looks: Collection[int],
) -> Iterator[Finished]:
    """The result of each batch, as it is finished; results that are computed are stored first.

    Args:
        runner: Runs the chains.
        loader: Batches of inputs and, where a measure reads them, labels; empty ones are left out.
        store: Where results are kept; None for nowhere.
        keys: Where there is a store, from `resnet_paths.lesions.keys.network_key`, one per chain; and indices of chains
            whose key does not say all that they compute.
        executor: Runs the batches; None for here.
        wanted: Indices of the chains to run, which the caller may change at each look.
        looks: Numbers of batches after which all results are yielded before the next batch is handed out.

    Yields:
        Position of the batch, its labels, result of all wanted chains, and whether all of it came from the store.
    """
    jobs = _jobs(runner, _read(loader), store, *keys, wanted, copies=executor is not None)
    yield from _run_here(runner, jobs) if executor is None else _run_on(executor, runner, jobs, looks)


def _read(loader: Iterable[object]) -> Iterator[object]:
    """What a loader gives; where it raises, the batch is named."""
    number, batches = 0, iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except ResnetPathsError:
            raise
        except Exception as error:
            raise ResnetPathsError(
                "loader",
                f"{type(error).__name__} at batch {number}: {error}",
                "a loader that gives all its batches",
                "Batches are counted from 0; those before it are kept where there is a store.",
            ) from error
        yield batch
        number += 1


def _jobs(
    runner: Runner,
    loader: Iterable[object],
    store: Store | None,
    keys: Sequence[str],
    undetermined: Sequence[int],
    wanted: Sequence[int],
    copies: bool,
) -> Iterator[_Job]:
    needs_labels = any(measure.reads for measure in runner.measures) or runner.shift_labels
    batches = map(unpack if needs_labels else unpack_optional, loader)
    for number, (inputs, labels) in enumerate(batch for batch in batches if num_examples(batch[0])):
        if copies:  # while it waits for a worker, a loader may use its tensors again
            inputs, labels = each_tensor(torch.clone, (inputs, labels))
        indices = list(wanted)  # as they are now
        if store is None:
            yield (inputs, labels, indices), _finisher(number, labels)
            continue
        if not number:
            keys = completed_keys(keys, runner, undetermined, inputs)
        batch = Store.batch_key(inputs, labels)
        known = store.read(batch, [keys[i] for i in indices], num_examples(inputs))
        # Lesions that come to the same network are computed once.
        missing = list({keys[i]: i for i in reversed(indices) if keys[i] not in known}.values())[::-1]
        if missing:
            store.require_writable()
        yield (
            (inputs, labels, missing),
            _stored_finisher(
                number, labels, store, batch, [keys[i] for i in indices], known, [keys[i] for i in missing]
            ),
        )


def _finisher(number: int, labels: torch.Tensor | None) -> Callable[[Sums | None], Finished]:
    def finish(result: Sums | None) -> Finished:
        assert result is not None  # without a store everything is missing
        return number, labels, result, False

    return finish


def _stored_finisher(
    number: int,
    labels: torch.Tensor | None,
    store: Store,
    batch: str,
    keys: Sequence[str],
    known: dict[str, Sums],
    missing: Sequence[str],
) -> Callable[[Sums | None], Finished]:
    def finish(result: Sums | None) -> Finished:
        rows = dict(known)
        if result is not None:
            store.write(batch, missing, result)
            rows |= {key: rows_of(result, [row]) for row, key in enumerate(missing)}
        return number, labels, joined([rows[key] for key in keys]), result is None

    return finish


def _run_here(runner: Runner, jobs: Iterable[_Job]) -> Iterator[Finished]:
    for (inputs, labels, missing), finish in jobs:
        yield finish(runner.run(inputs, labels, missing) if missing else None)


def _run_on(executor: Executor, runner: Runner, jobs: Iterator[_Job], looks: Collection[int]) -> Iterator[Finished]:
    with _refusing_what_cannot_be_sent():
        shared = shared_with_workers(executor, runner)
    # Enough to keep all workers busy, and no more: the data may be larger than memory.
    most = 2 * num_workers(executor)
    pending: dict[Future[Sums], Callable[[Sums | None], Finished]] = {}

    def wait(until: int) -> Iterator[Finished]:
        while len(pending) > until:
            done = concurrent.futures.wait(pending, return_when="FIRST_COMPLETED").done
            # Those that failed come last, so that no finished batch is lost.
            for future in sorted((f for f in pending if f in done), key=_failed):
                finish = pending.pop(future)
                yield finish(_result_of(future))

    failure: Exception | None = None
    try:
        for number in itertools.count():
            if number in looks:
                yield from wait(until=0)
            try:
                arguments, finish = next(jobs)
            except StopIteration:
                break
            except Exception as error:  # what was handed out is finished, and stored, first
                failure = error
                break
            if not arguments[2]:
                yield finish(None)
                continue
            with _refusing_broken_executor():
                future = executor.submit(run_batch, shared, *arguments)
            pending[future] = finish
            yield from wait(until=most - 1)
        yield from wait(until=0)
        if failure is not None:
            raise failure
    finally:
        for future in pending:
            future.cancel()


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
            "Finished batches are kept where there is a store: make a new executor and run the study again.",
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
            "a chain and measures that can be sent to another process",
            "Define modules and functions at the top of a file, not inside a function, or use a ThreadPoolExecutor.",
        ) from error


def _failed(future: Future[Sums]) -> bool:
    return future.cancelled() or future.exception() is not None


def _result_of(future: Future[Sums]) -> Sums:
    with _refusing_broken_executor(), _refusing_what_cannot_be_sent():
        return future.result()

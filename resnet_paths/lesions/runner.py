"""Runs the lesions of a study on a batch: in this process, in a thread, or on another machine.

What comes back is small: for each lesion the sums of each example that its measures read.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import torch

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.fingerprint import fingerprint
from resnet_paths._utils.threads import ignoring_warnings
from resnet_paths.core.inputs import Inputs, each_tensor, num_examples, require_movable, split
from resnet_paths.core.placement import PRECISIONS, device_of
from resnet_paths.lesions.measures import IGNORED, Measure
from resnet_paths.lesions.results import Sums, joined, sums_of
from resnet_paths.lesions.trie import Trie
from resnet_paths.lesions.validation import validate_outputs

__all__ = ["Runner", "counts_of_items", "num_workers", "run_batch", "shared_with_workers", "shifted"]


@dataclass
class Runner:
    """Chains, and where and how to run them. It is sent to each worker once, and placed on a device there.

    Attributes:
        trie: Edits of one chain.
        device: As for `resnet_paths.lesion_study`.
        precision: Likewise.
        channels_last: Likewise.
        batch_budget: Likewise.
        fold_batchnorm: Likewise.
        measures: What is measured.
        shift_labels: As for `resnet_paths.lesion_study`.
        statistics_batches: Batches of inputs to take BatchNorm statistics from; none keeps the intact network's.
        autocast: Device types for which `torch.autocast` is on where the study is called, each with its dtype. It is a
            setting of a thread, so that workers would not have it.
    """

    trie: Trie
    device: str | torch.device = "auto"
    precision: str | None = None
    channels_last: bool = False
    batch_budget: int | None = None
    fold_batchnorm: bool = False
    measures: tuple[Measure, ...] = ()
    shift_labels: bool = False
    statistics_batches: tuple[Inputs, ...] = ()
    autocast: tuple[tuple[str, torch.dtype], ...] = field(default_factory=lambda: tuple(_autocast_here()))
    _token: str = field(default_factory=lambda: uuid.uuid4().hex)
    _placed: tuple[Trie, torch.device, torch.dtype | None] | None = None
    _pickled: bytes | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, inputs: Inputs, labels: torch.Tensor | None, wanted: Sequence[int]) -> Sums:
        """What the chains with indices `wanted` do on a batch; rows come in the order of `wanted`.

        Args:
            inputs: A tensor [batch, ...], a tuple of positional arguments or a mapping of keyword arguments.
            labels: Labels [batch, ...]; None for a batch without labels.
            wanted: Indices of chains.

        Returns:
            The result.

        Raises:
            ResnetPathsError: If labels do not fit the logits, or one example alone does not fit into memory.
        """
        with self._lock:
            trie, device, dtype = self._settled()
        require_movable("loader", (inputs, labels), device)
        labels = None if labels is None else labels.to(device)
        batch = num_examples(inputs)
        while True:
            budget = self.batch_budget
            try:
                with _refusing_mixed_precision(self.precision), self._in_autocast():
                    parts = [
                        self._run_part(trie, self._as_wanted(x, device, dtype), y, wanted, budget)
                        for x, y in split(inputs, labels, budget or batch)
                    ]
                break
            except torch.OutOfMemoryError as error:
                self._halve_budget(budget, batch, error)
        return joined(parts, axis=1)

    def output_keys(self, inputs: Inputs, wanted: Sequence[int]) -> dict[int, str]:
        """Fingerprints of what the chains with indices `wanted` return for some inputs."""
        with self._lock:
            trie, device, dtype = self._settled()
        with (
            _refusing_mixed_precision(self.precision),
            self._in_autocast(),
            torch.no_grad() if trie.statistics else torch.inference_mode(),
        ):
            outputs = trie.logits(self._as_wanted(inputs, device, dtype), wanted)
            return {index: fingerprint(output) for index, output in outputs}

    def _run_part(
        self, trie: Trie, inputs: Inputs, labels: torch.Tensor | None, wanted: Sequence[int], budget: int | None
    ) -> Sums:
        labels = shifted(labels) if self.shift_labels and labels is not None else labels
        counts = counts_of_items(inputs, labels, self.shift_labels)
        row_of = {index: row for row, index in enumerate(wanted)}
        rows: dict[str, torch.Tensor] = {}
        intact: torch.Tensor | None = None
        # Not inference mode where operations are caught as they are dispatched: it hides them.
        with torch.no_grad() if trie.statistics else torch.inference_mode():
            if any(measure.reads_intact for measure in self.measures):
                # By itself: kept until the others wait for its outputs, all states that they start from would be.
                [(_, intact)] = trie.logits(inputs, [0])
            checked: set[object] = set()  # once for each head: the device is waited for
            for index, outputs in trie.logits(inputs, wanted, budget):
                shape = getattr(outputs, "shape", None)
                if shape is None or shape not in checked:
                    validate_outputs(self.measures, outputs, labels)
                    checked.add(shape)
                for name, sums in sums_of(self.measures, outputs, labels, intact, counts).items():
                    if name not in rows:
                        # In one place from the start: small tensors between large ones would keep the memory of these
                        # from being used again.
                        rows[name] = sums.new_zeros(len(wanted), *sums.shape)
                    rows[name][row_of[index]] = sums
        return {name: sums.cpu().numpy() for name, sums in rows.items()}  # the device is waited for here

    def _settled(self) -> tuple[Trie, torch.device, torch.dtype | None]:
        """The trie on its device; made at the first batch, where it runs."""
        if self._placed is None:
            trie = self.trie.placed(
                device=self.device,
                precision=self.precision,
                channels_last=self.channels_last,
                fold_batchnorm=self.fold_batchnorm,
            )
            device, dtype = device_of(*trie.steps), PRECISIONS.get(self.precision or "")
            try:
                with torch.no_grad(), self._in_autocast():
                    for inputs in self.statistics_batches:
                        trie.estimate(self._as_wanted(inputs, device, dtype))
            except torch.OutOfMemoryError as error:
                sizes = [num_examples(inputs) for inputs in self.statistics_batches]
                raise ResnetPathsError(
                    "reestimate_batchnorm",
                    f"batches of up to {max(sizes)} inputs",
                    "batches that fit into memory whole",
                    "Pass more, and smaller ones.",
                ) from error
            self._placed = trie, device, dtype
        return self._placed

    def _as_wanted(self, inputs: Inputs, device: torch.device, dtype: torch.dtype | None) -> Inputs:
        def wanted(tensor: torch.Tensor) -> torch.Tensor:
            images = self.channels_last and tensor.dim() == 4
            return tensor.to(
                device=device,
                dtype=dtype if tensor.is_floating_point() else None,
                memory_format=torch.channels_last if images else torch.preserve_format,
            )

        return each_tensor(wanted, inputs)

    @contextlib.contextmanager
    def _in_autocast(self) -> Iterator[None]:
        """Context with the autocast of the study, and no other."""
        with contextlib.ExitStack() as stack:
            for device, _ in _autocast_here():
                stack.enter_context(torch.autocast(device, enabled=False))
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype))
            yield

    def _halve_budget(self, failed: int | None, batch: int, error: torch.OutOfMemoryError) -> None:
        """Halve the number of examples at a time, for this batch and those to come."""
        smaller = (failed or batch) // 2
        if smaller < 1:
            raise ResnetPathsError(
                "batch_budget",
                1,
                "a network that fits into memory with one example",
                "Use a device with more memory, or precision='bfloat16'.",
            ) from error
        with self._lock:
            self.batch_budget = min(smaller, self.batch_budget or smaller)
        if torch.accelerator.is_available():
            getattr(torch.accelerator, "memory", torch.cuda).empty_cache()  # not in torch 2.7

    def __reduce__(self) -> tuple[Callable[[str, bytes], Runner], tuple[str, bytes]]:
        """Pickled once, and unpickled once in each process, however many batches are sent there."""
        if self._pickled is None:
            settings = (
                self.trie,
                self.device,
                self.precision,
                self.channels_last,
                self.batch_budget,
                self.fold_batchnorm,
                self.measures,
                self.shift_labels,
                self.statistics_batches,
                self.autocast,
                self._token,
            )
            self._pickled = pickle.dumps(settings, protocol=pickle.HIGHEST_PROTOCOL)
        return _unpickled_once, (self._token, self._pickled)


def _autocast_here() -> Iterator[tuple[str, torch.dtype]]:
    """Device types with autocast in this thread, and its dtype."""
    accelerator = torch.accelerator.current_accelerator()
    for device in ["cpu"] if accelerator is None else ["cpu", accelerator.type]:
        if torch.is_autocast_enabled(device):
            yield device, torch.get_autocast_dtype(device)


_IMPORTED_IN = os.getpid()
_SETTLED: dict[str, Runner] = {}
_UNPICKLING = threading.Lock()


def _unpickled_once(token: str, pickled: bytes) -> Runner:
    """This process's copy of a runner; the one before it is dropped."""
    with _UNPICKLING:
        if token not in _SETTLED:
            if os.getpid() != _IMPORTED_IN:
                # A fork has none of the threads of the process that it is a copy of, and would wait for them for ever.
                torch.set_num_threads(1)
            _SETTLED.clear()
            # Not a file: the bytes come from the process that asked this one to work, over the executor's own channel.
            runner = Runner(*pickle.loads(pickled))  # noqa: S301
            runner._pickled = pickled
            _SETTLED[token] = runner
        return _SETTLED[token]


def run_batch(runner: Runner, inputs: Inputs, labels: torch.Tensor | None, wanted: Sequence[int]) -> Sums:
    """`Runner.run` as a function that an executor can be given."""
    return runner.run(inputs, labels, wanted)


_WITHOUT_SIZE_WARNINGS = ignoring_warnings("Sending large graph")  # that is what is done here, and done once


def shared_with_workers(executor: Executor, runner: Runner) -> Any:
    """What to give an executor with each batch, so that the chains go to each worker once.

    Dask keeps a value with its workers and passes a reference. Of other executors each process unpickles the chains
    once; threads share them.

    Args:
        executor: Any executor; ``distributed.Client.get_executor()`` for Dask.
        runner: The chains.

    Returns:
        The first argument for `run_batch`.
    """
    client = getattr(executor, "_client", None)
    if client is None:
        return runner
    # A task, not scattered data: its result is passed from worker to worker, and made again if those that hold it die.
    rebuild, arguments = runner.__reduce__()
    with _WITHOUT_SIZE_WARNINGS:
        return client.submit(rebuild, *arguments, pure=False)


def num_workers(executor: Executor) -> int:
    """How many batches an executor works on at a time; 1 if it does not say."""
    client: Any = getattr(executor, "_client", None)
    if client is not None:
        return max(1, int(sum(client.nthreads().values())))
    return int(getattr(executor, "_max_workers", 1))


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Labels [batch, position] of tokens as those of the positions before them; the last position has none."""
    if labels.dim() != 2 or labels.is_floating_point():
        raise ResnetPathsError(
            "shift_labels",
            f"labels {labels.dtype} {list(labels.shape)}",
            "labels [batch, position], the input's tokens",
        )
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)


def counts_of_items(inputs: Inputs, labels: torch.Tensor | None, shift_labels: bool) -> torch.Tensor | None:
    """Which items of a batch count: those whose label is not -100, where the batch's ``attention_mask`` is not 0.

    Args:
        inputs: Of the batch.
        labels: Labels, already shifted if `shift_labels`; None for a batch without labels.
        shift_labels: Whether a position counts only if the next token is not padding either.

    Returns:
        Bool [batch, ...]; None where all count.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        mask = mask != 0
        if shift_labels:
            mask = mask & torch.cat([mask[:, 1:], torch.ones_like(mask[:, :1])], 1)
    else:
        mask = None
    if labels is None or labels.is_floating_point():
        return mask
    known = labels != IGNORED
    return known & mask if mask is not None and mask.shape == known.shape else known


@contextlib.contextmanager
def _refusing_mixed_precision(precision: str | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if precision is None or "dtype" not in str(error):
            raise
        raise ResnetPathsError(
            "precision",
            precision,
            "a precision that every operation of the network can run in",
            f"One answered: {error}",
        ) from error

"""Settings of the whole process, where several threads may need another value at once.

A context that saves a setting and restores it is not for threads: the second one saves what the first one has set, and
leaves that if it ends last. A `SharedContext` is entered by the first thread and left by the last.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["ONE_TRACE", "SharedContext", "ignoring_warnings", "refuse_fork_after_autograd", "requiring_gradients"]

ONE_TRACE = threading.RLock()
"""Held while a module is traced or exported: meanwhile torch replaces ``nn.Module.__call__``, for the whole process."""


class SharedContext:
    """A context in which any number of threads may be at once.

    Args:
        make: Makes the context that changes the setting; it is entered by the first thread, and left by the last.

    Example:
        >>> never_ignored = SharedContext(lambda: warnings.catch_warnings(action="always"))
        >>> with never_ignored, never_ignored:
        ...     pass
    """

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._num_inside = 0
        self._context: AbstractContextManager[object] = contextlib.nullcontext()

    def __enter__(self) -> None:
        """Change the setting, unless another thread has."""
        with self._lock:
            if not self._num_inside:
                self._context = self._make()
                self._context.__enter__()
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        """Restore the setting, unless another thread still needs it."""
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self._context.__exit__(None, None, None)


def ignoring_warnings(message: str) -> SharedContext:
    """Context in which a warning is not shown.

    Unlike `warnings.catch_warnings` it leaves all other filters alone, which other threads may have changed meanwhile.

    Args:
        message: Regular expression that the beginning of the warning matches.

    Returns:
        The context; keep it, and enter the same one in every thread.
    """

    @contextlib.contextmanager
    def ignoring() -> Iterator[None]:
        warnings.filterwarnings("ignore", message)
        added = warnings.filters[0]
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # removed by others
                warnings.filters.remove(added)  # type: ignore[attr-defined]

    return SharedContext(ignoring)


_REQUIRING = threading.Lock()
_NUM_REQUIRING: dict[int, int] = {}


@contextlib.contextmanager
def requiring_gradients(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Context in which leaves require gradients, also those that are frozen.

    Args:
        tensors: The leaves.

    Yields:
        Nothing.
    """
    with _REQUIRING:
        frozen = [t for t in tensors if not t.requires_grad or id(t) in _NUM_REQUIRING]
        for tensor in frozen:
            _NUM_REQUIRING[id(tensor)] = _NUM_REQUIRING.get(id(tensor), 0) + 1
            tensor.requires_grad_()
    try:
        yield
    finally:
        with _REQUIRING:
            for tensor in frozen:
                _NUM_REQUIRING[id(tensor)] -= 1
                if not _NUM_REQUIRING[id(tensor)]:
                    del _NUM_REQUIRING[id(tensor)]
                    tensor.requires_grad_(False)


@torch.inference_mode(False)
def refuse_fork_after_autograd() -> None:
    """Validate that autograd runs in this process: not if it ran before the fork, since its threads are not copied.

    Raises:
        ResnetPathsError: If it does not.
    """
    with torch.enable_grad():
        leaf = torch.ones(1, requires_grad=True)
        product = leaf * leaf
    try:
        torch.autograd.grad(product, leaf)
    except RuntimeError as error:
        raise ResnetPathsError(
            "process",
            "a fork of a process in which autograd had run",
            "one that was spawned, or forked before any backward pass",
            "Pass mp_context=multiprocessing.get_context('spawn') or 'forkserver' to the pool.",
        ) from error

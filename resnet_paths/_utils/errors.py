"""The errors of the package: `ResnetPathsError`, and subclasses for the errors that callers handle separately."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "MissingExtraError",
    "ResnetPathsError",
    "StoreError",
    "StudyInterrupted",
    "UnravelError",
    "nearest_names",
    "requires_extra",
]

_LONGEST_VALUE = 200


class ResnetPathsError(ValueError):
    """Invalid input: the message states the argument, the value received, the allowed values, and what to do.

    Base class of all errors that the package raises on purpose.

    Args:
        argument: Name of the argument, field or file that is invalid.
        value: The value received; shown as its `repr`, truncated to 200 characters.
        allowed: The values that are accepted, as a phrase.
        advice: What to do next, as a sentence; empty if `allowed` is enough.

    Example:
        >>> raise ResnetPathsError("length", 12, "an int from 0 to 9")
        Traceback (most recent call last):
            ...
        resnet_paths._utils.errors.ResnetPathsError: length: got 12; allowed: an int from 0 to 9.
    """

    def __init__(self, argument: str, value: object, allowed: str, advice: str = "") -> None:
        self.argument = argument
        self.value = value
        self.allowed = allowed
        self.advice = advice
        try:
            shown = repr(value)
        except Exception as error:  # such as an int of more than 4300 digits
            shown = f"<{type(value).__name__}: {error}>"
        if len(shown) > _LONGEST_VALUE:
            shown = shown[:_LONGEST_VALUE] + "..."
        message = f"{argument}: got {shown}; allowed: {allowed.rstrip('.')}."
        super().__init__(f"{message} {advice}".rstrip())

    def __reduce__(self) -> tuple[type[ResnetPathsError], tuple[str, object, str, str]]:
        """Support pickling, so that an error raised in a worker process reaches the caller."""
        return type(self), (self.argument, self.value, self.allowed, self.advice)


class UnravelError(ResnetPathsError):
    """A model that cannot be unraveled; the message names the node or module that prevents it."""


class MissingExtraError(ResnetPathsError):
    """A module of an optional dependency that is not installed; the message has the command that installs it."""


class StoreError(ResnetPathsError):
    """A folder of stored results that cannot be read or written."""


class StudyInterrupted(ResnetPathsError, KeyboardInterrupt):  # noqa: N818, named like KeyboardInterrupt
    """A lesion study that was interrupted by the user; the results of all finished batches are kept.

    It is also a `KeyboardInterrupt`, so that code that handles interrupts handles it as well.

    Args:
        frame: The rows over the finished batches; None if no batch was finished.
        num_batches: Number of finished batches.
        store: The folder in which they are stored; None if the study has no store.

    Attributes:
        frame: The rows over the finished batches, or None.
        num_batches: Number of finished batches.
        store: The folder in which they are stored, or None.
    """

    def __init__(self, frame: pd.DataFrame | None, num_batches: int, store: object = None) -> None:
        self.frame = frame
        self.num_batches = num_batches
        self.store = store
        rows = "The rows over them: import sys; frame = sys.last_value.frame." if num_batches else ""
        resume = "" if store is None else f"Run the same study again to resume from {str(store)!r}."
        if store is not None and num_batches:
            resume = f"They are kept in {str(store)!r}. {resume}"
        advice = f"{rows} {resume}".strip()
        super().__init__("lesion_study", num_batches, "a study that is not interrupted", advice)
        self.args = (f"stopped after {num_batches} batches. {advice}".rstrip(),)

    def __reduce__(self) -> tuple[type[StudyInterrupted], tuple[pd.DataFrame | None, int, object]]:  # type: ignore[override]
        """Support pickling."""
        return type(self), (self.frame, self.num_batches, self.store)


def nearest_names(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.3) -> str:
    """The known names that are most similar to `name`, quoted and joined, as in ``'layer1.0', 'layer1.1'``.

    Args:
        name: The name that was not found.
        known: All valid names.
        most: Maximum number of names to return.
        cutoff: Minimum similarity, from 0 (all names) to 1 (equal names only); see `difflib.get_close_matches`.

    Returns:
        The quoted names, most similar first; the first `most` known names if none is similar enough.
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=most, cutoff=cutoff) or known[:most]
    return ", ".join(repr(n) for n in near)


@contextlib.contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Context of imports that need an optional dependency of the package.

    Args:
        extra: The extra of the package that installs them, such as ``"notebooks"``.

    Yields:
        Nothing.

    Raises:
        MissingExtraError: If an import fails because a module is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"module {error.name!r}",
            "not installed",
            f"an environment with the extra {extra!r}",
            f"Install it with: pip install 'resnet_paths[{extra}]'; in a clone: pip install --editable '.[{extra}]'.",
        ) from error

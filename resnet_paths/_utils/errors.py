"""The one error type: every refusal names the argument, the value, what is allowed, and what to do.

Beside it `StudyInterrupted`, which is no refusal: somebody stopped a study by hand.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["ResnetPathsError", "StudyInterrupted", "nearest_names"]

_LONGEST_VALUE = 200


class ResnetPathsError(ValueError):
    """Input that cannot be worked with.

    Args:
        argument: Name of the argument, field or file that was refused.
        value: What was received; shown as `repr`, shortened to 200 characters.
        allowed: What would have been accepted, as a phrase.
        advice: What to do next, as a sentence; empty if `allowed` says it all.

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
        shown = repr(value)
        if len(shown) > _LONGEST_VALUE:
            shown = shown[:_LONGEST_VALUE] + "..."
        message = f"{argument}: got {shown}; allowed: {allowed.rstrip('.')}."
        super().__init__(f"{message} {advice}".rstrip())

    def __reduce__(self) -> tuple[type[ResnetPathsError], tuple[str, object, str, str]]:
        """Rebuild from the four parts, so that the error survives a trip between processes."""
        return type(self), (self.argument, self.value, self.allowed, self.advice)


class StudyInterrupted(KeyboardInterrupt):
    """A lesion study that was stopped by hand; nothing that was finished is lost.

    It stops a script, or a notebook that runs from top to bottom, as any interrupt does.

    Args:
        frame: Rows over the batches that were finished; None if there was none.
        num_batches: How many were finished.
        store: The folder where they lie; None if they lie nowhere else.

    Attributes:
        frame: As given.
    """

    def __init__(self, frame: Any, num_batches: int, store: object = None) -> None:
        self.frame = frame
        self.num_batches = num_batches
        self.store = store
        kept = f"Run the same study again to go on from {str(store)!r}." if store is not None else ""
        rows = "The rows over them: import sys; frame = sys.last_value.frame." if num_batches else ""
        super().__init__(f"stopped after {num_batches} batches. {rows} {kept}".rstrip())


def nearest_names(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.3) -> str:
    """The known names closest in spelling to `name`, quoted and joined, as in ``'layer1.0', 'layer1.1'``.

    Args:
        name: The name that was not found.
        known: All names that exist.
        most: How many to return at the most.
        cutoff: How alike a name must be to count as near, from 0 (any is) to 1 (only the same name is).

    Returns:
        The quoted names, nearest first; the first `most` known names if none is near.
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=most, cutoff=cutoff) or known[:most]
    return ", ".join(repr(n) for n in near)

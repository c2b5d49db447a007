"""The one error type: every refusal names the argument, the value, what is allowed, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ResnetPathsError", "nearest_names"]

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
        resnet_paths.errors.ResnetPathsError: length: got 12; allowed: an int from 0 to 9.
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

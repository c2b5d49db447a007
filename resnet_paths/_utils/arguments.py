"""Validation of arguments: one function for each kind, each raising one `ResnetPathsError` before any work."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from typing import SupportsIndex

import numpy as np
import torch

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["require_float", "require_generator", "require_int"]


def require_int(
    argument: str, value: object, least: int | None = None, most: int | None = None, *, noun: str = "an int"
) -> int:
    """Validate a whole number.

    Args:
        argument: Name of the argument, for the message.
        value: The value received; integers of NumPy and tensors of one integer are allowed.
        least: The smallest allowed; None for any.
        most: The largest allowed; None for any.
        noun: What it is, for the message.

    Returns:
        The number as a plain int.

    Raises:
        ResnetPathsError: If it is no whole number, or out of range.

    Example:
        >>> require_int("repeats", np.int64(3), 1)
        3
    """
    number: int | None = None
    if isinstance(value, SupportsIndex) and not is_boolean(value):
        try:
            number = operator.index(value)
        except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several numbers, or of floats
            number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        if least is None:
            allowed = noun
        else:
            allowed = f"{noun} of at least {least}" if most is None else f"{noun} from {least} to {most}"
        raise ResnetPathsError(argument, value, allowed)
    return number


def require_float(argument: str, value: object, allowed: str = "a finite number", least: float = -math.inf) -> float:
    """Validate a finite real number.

    Args:
        argument: Name of the argument, for the message.
        value: The value received; numbers of NumPy are allowed.
        allowed: What is allowed, for the message.
        least: The smallest allowed.

    Returns:
        The number as a plain float, or int.

    Raises:
        ResnetPathsError: If it is no real number, NaN, infinite, or smaller.

    Example:
        >>> require_float("factor", np.float32(0.5))
        0.5
    """
    if isinstance(value, int | float | numbers.Real) and not is_boolean(value):
        number = value if isinstance(value, int | float) else float(value)
        with contextlib.suppress(OverflowError):  # of an int beyond floats
            if math.isfinite(number) and number >= least:
                return number
    raise ResnetPathsError(argument, value, allowed)


def require_generator(argument: str, value: object) -> torch.Generator:
    """Validate a source of random numbers.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.

    Returns:
        The generator.

    Raises:
        ResnetPathsError: If it is no `torch.Generator`.
    """
    if not isinstance(value, torch.Generator):
        raise ResnetPathsError(argument, value, "a torch.Generator", "Pass torch.Generator().manual_seed(0).")
    return value


def is_boolean(value: object) -> bool:
    """Whether a value is True or False, also as a number of NumPy or in a tensor: none is taken for 0 or 1."""
    return isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) in (torch.bool, np.dtype(bool))

"""Validation of arguments: one function for each kind, each raising one `ResnetPathsError` before any work."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import SupportsIndex, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from resnet_paths._utils.errors import ResnetPathsError

__all__ = [
    "is_boolean",
    "require_choice",
    "require_float",
    "require_fraction",
    "require_frame",
    "require_function",
    "require_generator",
    "require_int",
    "require_list",
    "require_module",
    "require_path",
    "seeded_generator",
]

T = TypeVar("T")


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
        ResnetPathsError: If it is not an integer, or is out of range.

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
        ResnetPathsError: If it is not a real number, is NaN or infinite, or is smaller.

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


def require_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Validate that a value is one of some names.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.
        choices: The names.

    Raises:
        ResnetPathsError: If it is none of them.
    """
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ResnetPathsError(argument, value, f"one of {', '.join(map(repr, choices))}")


def require_fraction(argument: str, value: object) -> float:
    """Validate a number between 0 and 1.

    Args:
        argument: Name of the argument, for the message.
        value: The value received; numbers of NumPy are allowed.

    Returns:
        The number as a plain float.

    Raises:
        ResnetPathsError: If it is not a real number, or is 0, 1 or outside of them.
    """
    allowed = "a number between 0 and 1, both excluded"
    number = require_float(argument, value, allowed)
    if not 0 < number < 1:
        raise ResnetPathsError(argument, value, allowed)
    return number


def require_generator(argument: str, value: object) -> torch.Generator:
    """Validate a source of random numbers.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.

    Returns:
        The generator.

    Raises:
        ResnetPathsError: If it is not a `torch.Generator`.
    """
    if not isinstance(value, torch.Generator):
        raise ResnetPathsError(argument, value, "a torch.Generator", "Pass torch.Generator().manual_seed(0).")
    return value


def seeded_generator(argument: str, value: object) -> torch.Generator:
    """A source of random numbers, where None stands for a new one that is seeded with 0.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.

    Returns:
        The generator.
    """
    return torch.Generator().manual_seed(0) if value is None else require_generator(argument, value)


def is_boolean(value: object) -> bool:
    """Whether a value is True or False, also as a number of NumPy or in a tensor: none is taken for 0 or 1."""
    return isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) in (torch.bool, np.dtype(bool))


def require_list(argument: str, value: Iterable[T], allowed: str, advice: str = "") -> list[T]:
    """Validate that an argument can be iterated over, and is not a string.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.
        allowed: What is allowed, for the message.
        advice: What to do, for the message.

    Returns:
        What it holds.

    Raises:
        ResnetPathsError: If it cannot be iterated over.
    """
    received: object = value
    if isinstance(received, Iterable) and not isinstance(received, str | bytes):
        with contextlib.suppress(TypeError):  # a tensor of one number, or a class
            return list(received)
    raise ResnetPathsError(argument, value, allowed, advice)


def require_module(argument: str, value: object, *, optional: bool = False) -> None:
    """Validate a module: an instance, not a class or a function.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.
        optional: Whether None is allowed.

    Raises:
        ResnetPathsError: If it is not one.
    """
    if not isinstance(value, nn.Module) and not (optional and value is None):
        raise ResnetPathsError(argument, value, "a torch.nn.Module, or None" if optional else "a torch.nn.Module")


def require_path(argument: str, value: object) -> Path:
    """Validate the path of a file or folder, which need not exist.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.

    Returns:
        The path.

    Raises:
        ResnetPathsError: If it is not a string or a path, or contains a null character.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or "\0" in os.fspath(value):
        raise ResnetPathsError(argument, value, "a str or a pathlib.Path without null characters")
    return Path(value)


def require_frame(argument: str, value: object, columns: Iterable[str] = ()) -> pd.DataFrame:
    """Validate a frame.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.
        columns: Those that it must have.

    Returns:
        The frame.

    Raises:
        ResnetPathsError: If it is not a data frame, or a column is missing.
    """
    columns = list(columns)
    allowed = f"a pandas DataFrame with columns {', '.join(columns)}" if columns else "a pandas DataFrame"
    if not isinstance(value, pd.DataFrame):
        raise ResnetPathsError(argument, type(value).__name__, allowed)
    if not set(columns) <= set(value.columns):
        raise ResnetPathsError(argument, f"columns {', '.join(map(str, value.columns)) or '(none)'}", allowed)
    return value


def require_function(argument: str, value: object, allowed: str) -> None:
    """Validate that an argument can be called, and is not a class.

    Args:
        argument: Name of the argument, for the message.
        value: The value received.
        allowed: What is allowed, for the message.

    Raises:
        ResnetPathsError: If it cannot be called.
    """
    if not callable(value) or isinstance(value, type):
        raise ResnetPathsError(argument, value, allowed)

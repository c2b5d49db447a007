"""Whether a module computes something else while it is trained, as its own code says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["depends_on_mode", "require_eval_mode"]


def depends_on_mode(kind: type[nn.Module]) -> bool:
    """Whether modules of a class may compute something else in training mode than in eval mode.

    They may if ``forward``, or a method or property of the class that it leads to, reads ``self.training``: so do
    dropout of every kind, BatchNorm, attention, recurrent layers, stochastic depth. A linear map does not.

    Args:
        kind: A class of modules, torch's or a user's.

    Returns:
        Whether it does. What functions outside the class read is not seen.

    Example:
        >>> [depends_on_mode(kind) for kind in (nn.Linear, nn.ReLU, nn.Dropout, nn.RReLU)]
        [False, False, True, True]
    """
    # Methods of nn.Module itself, such as train, are left out.
    classes = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for member in (vars(base)[name] for base in classes if name in vars(base)):
            read = {found for code in _codes_of(member) for found in code.co_names}
            if "training" in read:
                return True
            waiting += read
    return False


def require_eval_mode(argument: str, module: nn.Module) -> None:
    """Validate that a module computes what it computes in eval mode: no dropout, no updates of running statistics.

    Args:
        argument: Name of the argument, for the message.
        module: A model or a chain.

    Raises:
        ResnetPathsError: If a part whose code asks for the mode is in training mode, or BatchNorm normalises by the
            batch even in eval mode; it is named.
    """
    for name, part in module.named_modules():
        shown = f"{type(part).__name__} {name!r}" if name else type(part).__name__
        if part.training and depends_on_mode(type(part)):
            raise ResnetPathsError(
                argument, f"{shown} in training mode", f"a {argument} in eval mode", f"Call {argument}.eval() first."
            )
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ResnetPathsError(
                argument,
                f"{shown} without running statistics",
                "normalisation that treats each example alone",
                "Make it with track_running_stats=True.",
            )


def _codes_of(member: object) -> Iterator[CodeType]:
    """The code of a method or property, without its decorators, and of the functions that it defines inside."""
    function: Any = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    waiting = [getattr(inspect.unwrap(function), "__code__", None)]
    while waiting:
        code = waiting.pop()
        if isinstance(code, CodeType):
            yield code
            waiting += code.co_consts

"""One way to call a model: tensors in a row go in, one tensor comes out.

Models take tensors, tuples, keyword arguments and dictionaries, and return tensors, tuples, dictionaries and data
classes. What is exported is the call, which has the model's own parameters under their own names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["Call", "Function", "Inputs", "Signature", "arguments_of"]

Inputs: TypeAlias = torch.Tensor | Sequence[object] | Mapping[str, object]
"""What a model is called with: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""

_MAIN_OUTPUTS = ("logits", "last_hidden_state", "out")


def arguments_of(example_inputs: Inputs) -> tuple[tuple[object, ...], dict[str, object]]:
    """Positional and keyword arguments that an example stands for.

    Args:
        example_inputs: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Returns:
        The arguments.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,), {}


class _Place:
    """Placeholder of a tensor."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """The tensors among a model's arguments, and what stands around them.

    Attributes:
        spec: Nesting of all arguments.
        constants: A value for each leaf that is no tensor, None for those that are.
        is_tensor: Which leaves are tensors.
    """

    spec: pytree.TreeSpec
    constants: tuple[object, ...]
    is_tensor: tuple[bool, ...]

    @classmethod
    def of(cls, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Signature, tuple[torch.Tensor, ...]]:
        """The signature of a call, and its tensors."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        is_tensor = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        constants = tuple(None if tensor else leaf for leaf, tensor in zip(leaves, is_tensor, strict=True))
        tensors = tuple(leaf for leaf, tensor in zip(leaves, is_tensor, strict=True) if tensor)
        return cls(spec, constants, is_tensor), tensors

    @property
    def names(self) -> list[str]:
        """A name for each tensor: its keyword, or its position."""
        args, kwargs = self.arguments([_Place() for _ in range(sum(self.is_tensor))])
        named = [(f"argument {index}", value) for index, value in enumerate(args)] + list(kwargs.items())
        return [name for name, value in named for leaf in pytree.tree_leaves(value) if type(leaf) is _Place]

    @property
    def is_plain(self) -> bool:
        """Whether the arguments are tensors in a row already."""
        args, kwargs = self.arguments([None] * sum(self.is_tensor))
        return not kwargs and all(self.is_tensor) and len(args) == len(self.is_tensor)

    def arguments(self, tensors: Iterable[object]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Tensors put back among the other arguments."""
        waiting = iter(tensors)
        each = zip(self.constants, self.is_tensor, strict=True)
        args, kwargs = pytree.tree_unflatten([next(waiting) if tensor else c for c, tensor in each], self.spec)
        return args, kwargs

    def tensors(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[torch.Tensor, ...]:
        """The tensors of another call of the same kind.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments, in any order.

        Returns:
            Its tensors, in the order of the first call's.

        Raises:
            ResnetPathsError: If it is not of the same kind.
        """
        known = self.arguments([None] * sum(self.is_tensor))[1]
        if set(kwargs) == set(known):
            kwargs = {name: kwargs[name] for name in known}
        other, tensors = Signature.of(args, kwargs)
        if other.spec != self.spec or other.is_tensor != self.is_tensor or other.constants != self.constants:
            raise ResnetPathsError(
                "inputs",
                f"{len(args)} positional arguments and {sorted(kwargs)}",
                f"arguments as in the example that was unraveled, with {sorted(known)}",
                "Unravel the model again with an example of this kind.",
            )
        return tensors


class Call(nn.Module):
    """A model called in one way. It has the model's own parameters, buffers and modules, under their own names.

    Args:
        model: The model.
        signature: What its tensors stand among.
        output: Which of its outputs to return: a name, a position, or None for the main one.
    """

    def __init__(self, model: nn.Module, signature: Signature, output: str | int | None) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training
        self._called = (model,)  # in a tuple: not a module of this one's, whose names would begin with it
        self._signature = signature
        self._output = output

    @property
    def called_name(self) -> str:
        """The class of the model, for messages."""
        return type(self._called[0]).__name__

    @property
    def input_names(self) -> list[str]:
        """A name for each tensor, as in `Signature.names`."""
        return self._signature.names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The chosen output."""
        args, kwargs = self._signature.arguments(tensors)
        return chosen(self._called[0](*args, **kwargs), self._output)


class Function(nn.Module):
    """A function as a module.

    Args:
        function: It is given the module, then the tensors, then what this module is called with. To be sent to other
            processes it is a function at the top of a file, or `functools.partial` of one.
        module: A module that it uses; None if it uses none.
        tensors: Tensors that it uses; they follow where this module is moved or converted.
    """

    def __init__(
        self, function: Callable[..., Any], module: nn.Module | None = None, tensors: Iterable[torch.Tensor] = ()
    ) -> None:
        super().__init__()
        self.function = function
        self.module = module
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{index}", tensor, persistent=False)
        self.training = False

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """What the function returns."""
        held = [] if self.module is None else [self.module]
        return self.function(*held, *self.buffers(recurse=False), *inputs, **keywords)


def chosen(returned: object, output: str | int | None) -> torch.Tensor:
    """One tensor of what a model returns.

    Args:
        returned: A tensor, or a tuple, list, mapping or data class.
        output: A name or a position; None for the only tensor, ``logits``, ``last_hidden_state``, ``out``, or the first
            tensor.

    Returns:
        The tensor.

    Raises:
        ResnetPathsError: If there is no such output, or it is no tensor.
    """
    if isinstance(returned, torch.Tensor) and output is None:
        return returned
    named = _named(returned)
    tensors = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
    key: object = output
    if key is None:
        key = next((name for name in (*_MAIN_OUTPUTS, *tensors) if name in tensors), None)
    if isinstance(key, int) and -len(named) <= key < len(named):
        key = list(named)[key]
    tensor = named.get(key) if isinstance(key, str | int) else None
    if not isinstance(tensor, torch.Tensor):
        raise ResnetPathsError("output", key, f"one of {tensors}", f"The model returns a {type(returned).__name__}.")
    return tensor


def _named(returned: object) -> dict[object, object]:
    if isinstance(returned, Mapping):
        return dict(returned)
    if dataclasses.is_dataclass(returned) and not isinstance(returned, type):
        return {f.name: getattr(returned, f.name) for f in dataclasses.fields(returned)}
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return dict(zip(returned._fields, returned, strict=True))
    if isinstance(returned, tuple | list):
        return dict(enumerate(returned))
    return {0: returned}

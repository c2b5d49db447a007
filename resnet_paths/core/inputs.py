"""Batches: inputs in any form that a model is called with, and what they are to be held against.

Inputs are a tensor, a tuple of positional arguments or a mapping of keyword arguments, as for `resnet_paths.unravel`. A
batch is a pair (inputs, labels), or one mapping that holds the labels too, as those of Hugging Face do.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.signature import Inputs

__all__ = [
    "LABELS_ARE_APART",
    "Inputs",
    "InputsOrLoader",
    "batches_of",
    "batches_with_bar",
    "checked_inputs",
    "each_tensor",
    "inputs_of",
    "is_one_batch",
    "num_examples",
    "refusing_other_dtypes",
    "refusing_other_inputs",
    "require_loader",
    "require_movable",
    "split",
    "unpack",
    "unpack_optional",
]

InputsOrLoader: TypeAlias = Inputs | Iterable[object]
"""The inputs of one batch, or batches of (inputs, targets) or of mappings."""

LABELS_ARE_APART = "Labels are no input: pass them as targets, or a loader of pairs such as [(inputs, labels)]."
"""What to do where a caller may have passed (inputs, labels) as the inputs."""

T = TypeVar("T")

_LABELS = "labels"
_FORMS = "a tensor, a tuple of positional arguments or a mapping of keyword arguments with tensors among them"


def require_loader(loader: object) -> None:
    """Validate that an argument can be iterated over batch by batch.

    Args:
        loader: The value received.

    Raises:
        ResnetPathsError: If it is not iterable.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ResnetPathsError(
            "loader",
            type(loader).__name__,
            "batches of (inputs, labels)",
            "Wrap a data set in torch.utils.data.DataLoader.",
        )


def unpack(batch: object) -> tuple[Inputs, torch.Tensor]:
    """Inputs and labels of a batch, whole labels as int64.

    Args:
        batch: What a loader gave: a pair, or a mapping with the key ``"labels"`` and keyword arguments.

    Returns:
        Inputs, a tensor, tuple or dictionary, and labels [batch, ...].

    Raises:
        ResnetPathsError: If it is not a batch, its tensors have different lengths or are not dense, or labels are
            complex.
    """
    if isinstance(batch, Mapping):
        labels = batch.get(_LABELS)
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if not isinstance(labels, torch.Tensor):
        keys = f" of {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
        raise ResnetPathsError(
            "loader",
            type(batch).__name__ + keys,
            f"batches of (inputs, labels), or mappings with {_LABELS!r} among their keys; labels are a tensor",
            "Wrap a data set in torch.utils.data.DataLoader; without labels, choose measures that read none.",
        )
    inputs = inputs_of(batch)
    _require_dense("loader", inputs)
    _require_dense("labels", labels)
    if labels.is_complex():
        raise ResnetPathsError("labels", f"{labels.dtype} {list(labels.shape)}", "integers or real values")
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    # One row for all examples, such as positions, belongs to every example.
    lengths = set(_lengths(inputs))
    if not labels.dim() or not lengths or max(lengths) != len(labels) or not lengths <= {1, len(labels)}:
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ResnetPathsError(
            "loader",
            f"labels {list(labels.shape)} for inputs {shapes[0] if len(shapes) == 1 else shapes}",
            "one label for each input",
        )
    return inputs, labels if labels.is_floating_point() else labels.long()


def unpack_optional(batch: object) -> tuple[Inputs, torch.Tensor | None]:
    """Inputs of a batch, and its labels where it has any.

    Args:
        batch: As for `unpack`; or inputs alone: a tensor, a mapping without labels, a list or tuple of one element, or
            a pair of inputs and None.

    Returns:
        Inputs, and labels [batch, ...] or None.
    """
    if isinstance(batch, Mapping):
        has_labels = batch.get(_LABELS) is not None
    else:
        has_labels = isinstance(batch, tuple | list) and len(batch) == 2 and batch[1] is not None
    return unpack(batch) if has_labels else (checked_inputs(inputs_of(batch)), None)


def is_one_batch(inputs: object) -> bool:
    """Whether a caller gave the inputs of one batch, and no loader: those hold no tensor outside of their batches.

    Args:
        inputs: What a caller gave.

    Returns:
        Whether it is a tensor, a mapping, or a tuple or list with a tensor in it.
    """
    if isinstance(inputs, tuple | list):
        return any(isinstance(value, torch.Tensor) for value in inputs)
    return isinstance(inputs, torch.Tensor | Mapping)


def batches_of(inputs: InputsOrLoader, targets: object = None) -> Iterator[tuple[Inputs, object]]:
    """Batches of (inputs, targets), from a single one or a loader.

    Args:
        inputs: A tensor, a tuple of positional arguments, a mapping of keyword arguments; or an iterable of
            (inputs, targets), or of mappings. Labels in a mapping are its targets, unless others are given.
        targets: What belongs to a single batch, of any kind; None with a loader.

    Yields:
        Inputs, a tensor, tuple or dictionary, and targets of each batch; the targets are None where a batch has no
        targets. Batches without examples are left out.

    Raises:
        ResnetPathsError: If there is no batch or no example, or one is no such inputs.
    """
    given: Iterable[object] = inputs if isinstance(inputs, Iterable) else []
    if is_one_batch(inputs):
        given = [inputs if targets is None and isinstance(inputs, Mapping) else (inputs, targets)]
    elif targets is not None:
        raise ResnetPathsError("targets", type(targets).__name__, "None where inputs is a loader of (inputs, targets)")
    num_batches = num_seen = 0
    for batch in given:
        num_batches += 1
        if not isinstance(batch, Mapping) and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ResnetPathsError("inputs", type(batch).__name__, "batches of (inputs, targets), or mappings")
        own, truth = _inputs_and_targets(batch)
        if num_examples(own):
            num_seen += num_examples(own)
            yield own, truth
    if not num_batches:
        raise ResnetPathsError("inputs", type(inputs).__name__, f"{_FORMS}; or a loader with a batch")
    if not num_seen:
        raise ResnetPathsError("inputs", "no examples", "at least one example")


def batches_with_bar(
    what: str, inputs: InputsOrLoader, targets: object, progress: bool
) -> Iterator[tuple[Inputs, object]]:
    """The same batches, with a bar that states batches and examples where they come from a loader.

    Args:
        what: Text in front of the bar.
        inputs: As for `batches_of`.
        targets: Likewise.
        progress: Whether to show the bar.

    Yields:
        Inputs and targets of each batch.
    """
    disable = not progress or is_one_batch(inputs)
    bar, num_seen = tqdm(batches_of(inputs, targets), desc=what, unit="batch", disable=disable), 0
    for batch in bar:
        yield batch
        num_seen += num_examples(batch[0])
        bar.set_postfix_str(f"{num_seen} examples", refresh=False)


def _inputs_and_targets(batch: Mapping[str, object] | Sequence[object]) -> tuple[Inputs, object]:
    targets = batch.get(_LABELS) if isinstance(batch, Mapping) else batch[1]
    _require_dense("targets", targets)
    return checked_inputs(inputs_of(batch)), dict(targets) if isinstance(targets, Mapping) else targets


def inputs_of(batch: Any) -> Inputs:
    """The inputs of a batch, its labels left out.

    Args:
        batch: A pair (inputs, labels), a mapping, or inputs alone.

    Returns:
        A tensor, a tuple of positional arguments or a dictionary of keyword arguments.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(inputs, Mapping):
        return {name: value for name, value in inputs.items() if name != _LABELS or inputs is not batch}
    return tuple(inputs) if isinstance(inputs, list) else inputs


def checked_inputs(inputs: object) -> Inputs:
    """Inputs of one batch.

    Args:
        inputs: What a caller gave.

    Returns:
        A tensor, a tuple of positional arguments or a dictionary of keyword arguments.

    Raises:
        ResnetPathsError: If they are none of these, hold no tensor, or their tensors are not of one length.
    """
    if isinstance(inputs, Mapping | list):
        inputs = dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)
    _require_dense("inputs", inputs)
    lengths = set(_lengths(inputs))
    if not isinstance(inputs, torch.Tensor | tuple | dict) or not lengths:
        raise ResnetPathsError("inputs", type(inputs).__name__, f"{_FORMS}, with the batch in dimension 0")
    if not lengths <= {1, max(lengths)}:
        shapes = [list(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        raise ResnetPathsError("inputs", shapes, "tensors with a row for each example, or one row for all")
    return inputs


@contextlib.contextmanager
def refusing_other_dtypes(inputs: object, name: str, *parts: nn.Module) -> Iterator[None]:
    """Context of a call of a stem or a chain, where an error that is due to the dtype of the inputs says so.

    Nothing is refused that the parts take: they may convert their inputs themselves.

    Args:
        inputs: Its arguments, in any nesting.
        name: What is called, for the message.
        *parts: Its modules.

    Yields:
        Nothing.

    Raises:
        ResnetPathsError: If torch refuses a dtype, and no input has one of the parts' weights.
        RuntimeError: Every other error of the parts, as it was.
    """
    try:
        yield
    except RuntimeError as error:
        given = {leaf.dtype for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
        own = {weight.dtype for part in parts for weight in part.parameters()}
        if "type" not in str(error) or not own or given & own:
            raise
        raise ResnetPathsError(
            "inputs",
            ", ".join(sorted(map(str, given))),
            f"inputs of a dtype that the {name} takes, whose weights are {', '.join(sorted(map(str, own)))}",
            f"Convert the inputs or the chain. torch answered: {error}",
        ) from error


@contextlib.contextmanager
def refusing_other_inputs(stem: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Iterator[None]:
    """Context of a call of a stem, where an error that is due to the dtype or the number of the inputs says so.

    Args:
        stem: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Yields:
        Nothing.

    Raises:
        ResnetPathsError: As `refusing_other_dtypes`, and if the arguments are not those of the stem.
        TypeError: Every other error of the stem, as it was.
    """
    try:
        with refusing_other_dtypes((args, kwargs), "stem", stem):
            yield
    except TypeError as error:
        expected = inspect.signature(stem.forward)
        try:
            expected.bind(*args, **kwargs)
        except TypeError as mismatch:
            given = [_shown(value) for value in args] + [f"{name}={_shown(value)}" for name, value in kwargs.items()]
            allowed = f"the arguments of the stem, {', '.join(map(str, expected.parameters.values()))}"
            advice = f"Its call: {mismatch}. {LABELS_ARE_APART}"
            raise ResnetPathsError("inputs", f"({', '.join(given)})", allowed, advice) from error
        raise


def _shown(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _require_dense(argument: str, value: object) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and (leaf.is_nested or leaf.layout is not torch.strided):
            layout = "nested" if leaf.is_nested else leaf.layout
            raise ResnetPathsError(argument, f"a tensor of layout {layout}", "dense tensors", "Call .to_dense().")


def each_tensor(function: Callable[[torch.Tensor], torch.Tensor], inputs: T) -> T:
    """Inputs with a function taken of every tensor among them."""
    mapped: T = pytree.tree_map_only(torch.Tensor, function, inputs)
    return mapped


def require_movable(argument: str, values: object, device: torch.device) -> None:
    """Validate that tensors can be moved to a device.

    Args:
        argument: Name of the argument, for the message.
        values: Inputs, targets, or a batch of both.
        device: The device.

    Raises:
        ResnetPathsError: If a tensor is on the meta device and the device is another one.
    """
    if device.type != "meta" and any(isinstance(x, torch.Tensor) and x.is_meta for x in pytree.tree_leaves(values)):
        advice = "Tensors on 'meta' have a shape, but no values."
        raise ResnetPathsError(argument, "a tensor on 'meta'", f"tensors that can be moved to {device}", advice)


def num_examples(inputs: object) -> int:
    """Length of the longest tensor among the inputs: others hold one row for all examples, or none."""
    return max(_lengths(inputs), default=0)


def _lengths(inputs: object) -> list[int]:
    """Of every tensor that has one."""
    return [len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]


def split(inputs: Inputs, targets: T, size: int) -> Iterator[tuple[Inputs, T]]:
    """Parts of a batch.

    Args:
        inputs: From `unpack` or `batches_of`.
        targets: Likewise: labels [batch, ...], or a collection of such.
        size: Most examples of a part.

    Yields:
        Inputs and targets of each part, in order; what has no row for each example is in every part.
    """
    batch = num_examples(inputs)
    for start in range(0, batch, size):
        part = slice(start, start + size)
        yield each_tensor(lambda t: t[part] if t.dim() and len(t) == batch else t, (inputs, targets))  # noqa: B023 - used at once

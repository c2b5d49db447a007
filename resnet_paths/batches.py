"""A batch of a loader: inputs in any form that a model is called with, and labels.

Inputs are a tensor, a tuple of positional arguments or a mapping of keyword arguments, as for `resnet_paths.unravel`. A
batch is a pair (inputs, labels), or one mapping that holds the labels too, as those of Hugging Face do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from resnet_paths.errors import ResnetPathsError
from resnet_paths.unraveling.calling import arguments_of

__all__ = ["call", "each_tensor", "inputs_of", "num_examples", "refuse_other_than_loader", "split", "unpack"]

_LABELS = "labels"


def refuse_other_than_loader(loader: object) -> None:
    """Refuse what cannot be read batch by batch.

    Args:
        loader: What a caller gave.

    Raises:
        ResnetPathsError: If it is no loader.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ResnetPathsError(
            "loader", type(loader).__name__, "batches of (inputs, labels)",
            "Wrap a data set in torch.utils.data.DataLoader.",
        )  # fmt: skip


def unpack(batch: Any) -> tuple[Any, torch.Tensor]:
    """Inputs and labels of a batch, whole labels as int64.

    Args:
        batch: What a loader gave: a pair, or a mapping with the key ``"labels"`` and keyword arguments.

    Returns:
        Inputs, a tensor, tuple or dictionary, and labels [batch, ...].

    Raises:
        ResnetPathsError: If it is none, or its tensors are not of one length.
    """
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    labels = batch.get(_LABELS) if isinstance(batch, Mapping) else batch[1] if is_pair else None
    if not isinstance(labels, torch.Tensor):
        keys = f" of {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
        raise ResnetPathsError(
            "loader", type(batch).__name__ + keys,
            f"batches of (inputs, labels), or mappings with {_LABELS!r} among their keys; labels are a tensor",
            "Wrap a data set in torch.utils.data.DataLoader.",
        )  # fmt: skip
    inputs = inputs_of(batch)
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    # One row for all examples, such as positions, belongs to every example.
    lengths = {len(tensor) for tensor in tensors if tensor.dim()}
    if not labels.dim() or not lengths or max(lengths) != len(labels) or not lengths <= {1, len(labels)}:
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ResnetPathsError(
            "loader", f"labels {list(labels.shape)} for inputs {shapes[0] if len(shapes) == 1 else shapes}",
            "one label for each input",
        )  # fmt: skip
    whole = not labels.is_floating_point() and not labels.is_complex()
    return inputs, labels.long() if whole else labels


def inputs_of(batch: Any) -> Any:
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


def call(module: nn.Module, inputs: Any) -> Any:
    """What a model, a chain or a stem returns for the inputs of a batch.

    Args:
        module: The module.
        inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Returns:
        Its output.
    """
    args, kwargs = arguments_of(inputs)
    return module(*args, **kwargs)


def each_tensor(function: Callable[[torch.Tensor], torch.Tensor], inputs: Any) -> Any:
    """Inputs with a function taken of every tensor among them."""
    return pytree.tree_map_only(torch.Tensor, function, inputs)


def num_examples(inputs: Any) -> int:
    """Length of the longest tensor among the inputs: others hold one row for all examples, or none."""
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    return max((len(tensor) for tensor in tensors if tensor.dim()), default=0)


def split(inputs: Any, labels: torch.Tensor, size: int) -> Iterator[tuple[Any, torch.Tensor]]:
    """Parts of a batch.

    Args:
        inputs: From `unpack`.
        labels: Likewise, [batch, ...].
        size: Most examples of a part.

    Yields:
        Inputs and labels of each part, in order; what is one row for all examples is in every part.
    """
    batch = len(labels)
    for start in range(0, batch, size):
        part = slice(start, start + size)
        of_part = each_tensor(lambda t: t[part] if t.dim() and len(t) == batch else t, inputs)  # noqa: B023 - used at once
        yield of_part, labels[part]

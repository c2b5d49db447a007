"""Modules made ready to run: on a device, in a precision, layout and form; copies, so that their model stays put."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from resnet_paths._utils.devices import choose_device
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.folding import fold_batchnorm as fold

__all__ = ["PRECISIONS", "device_of", "place_modules", "validate_precision"]

Module = TypeVar("Module", bound=nn.Module)

PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Names of the precisions that a study can run in."""


def device_of(*modules: nn.Module) -> torch.device:
    """Where the first parameter or buffer of some modules lies; the CPU if they have none."""
    tensors = (t for module in modules for t in itertools.chain(module.parameters(), module.buffers()))
    return next((t.device for t in tensors), torch.device("cpu"))


def validate_precision(precision: object, chain: ResidualChain) -> None:
    """Validate an argument `precision`, and that a chain computes in it what its model would.

    Args:
        precision: The value received.
        chain: The chain that is to be converted.

    Raises:
        ResnetPathsError: If it is not a key of `PRECISIONS`, or lower than the chain's own and the model's code
            computes some of it in a dtype of its choice, such as the statistics of a norm in float32: a graph that was
            exported in float32 does not show where.
    """
    if precision is None:
        return
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ResnetPathsError("precision", precision, f"one of {', '.join(map(repr, PRECISIONS))}, or None")
    dtypes = {tensor.dtype for tensor in chain.parameters() if tensor.is_floating_point()}
    if chain.casts and any(dtype.itemsize > PRECISIONS[precision].itemsize for dtype in dtypes):
        raise ResnetPathsError(
            "precision",
            precision,
            f"the precision of the chain, or a higher one: {chain.casts[0]!r} chooses dtypes itself, such as float32",
            "Such casts are lost in this chain. Convert the model first: "
            f"unravel(model.to(torch.{precision}), example_inputs), with precision=None.",
        )


def place_modules(
    modules: Sequence[Module],
    *,
    device: str | torch.device = "auto",
    precision: str | None = None,
    channels_last: bool = False,
    fold_batchnorm: bool = False,
) -> list[Module]:
    """Modules in the place asked for, together, so that what they share they share afterwards.

    Args:
        modules: Such as edits of one chain, or steps of them; none is changed.
        device: Target device; ``"auto"`` keeps their device, or is the accelerator if they are on the CPU and one is
            available.
        precision: A key of `PRECISIONS`; None leaves every parameter in its own.
        channels_last: Whether images are stored with their channels last, which many convolutions are faster
            with.
        fold_batchnorm: Whether to fold BatchNorm into the convolutions of exported parts (`resnet_paths.core.folding`).

    Returns:
        The modules themselves if nothing has to change, else copies.

    Raises:
        ResnetPathsError: If the device or the precision is not one.
    """
    modules = list(modules)
    if precision is not None and precision not in PRECISIONS:
        raise ResnetPathsError("precision", precision, f"one of {', '.join(map(repr, PRECISIONS))}, or None")
    here = device_of(*modules)
    there = here if device == "auto" and here.type != "cpu" else choose_device(device)
    dtype = None if precision is None else PRECISIONS[precision]
    # Of all: a lesion may bring tensors of its own.
    together = nn.ModuleList(modules)
    tensors = [*together.parameters(), *together.buffers()]
    moves = not all(_lies_on(t, there) for t in tensors)
    converts = dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in tensors)
    if not (moves or converts or channels_last or fold_batchnorm):
        return modules
    together = copy.deepcopy(together)
    if fold_batchnorm:
        # Once for each part, however many chains share it, and before precision is lost.
        for module in together.modules():
            if isinstance(module, GraphModule):
                fold(module)
    together.to(device=there, dtype=dtype if converts else None)
    if channels_last:
        for tensor in itertools.chain(together.parameters(), together.buffers()):
            if tensor.dim() == 4:  # images; volumes have five dimensions
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return list(together)  # type: ignore[arg-type]


def _lies_on(tensor: torch.Tensor, device: torch.device) -> bool:
    # "cuda" and "cuda:0" are one device, but not equal.
    return tensor.device.type == device.type and device.index in (None, tensor.device.index or 0)

"""What a training step holds in memory, measured by looking at every tensor that torch makes and lets go.

The bytes are those of tensors, whatever the device: they are the same on every machine. What kernels allocate for
themselves, and what an allocator keeps back, come on top.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_paths._utils.errors import ResnetPathsError

__all__ = ["TrainingMemory", "training_memory"]


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of tensors in one forward and backward pass.

    Attributes:
        parameters: Of parameters and buffers.
        saved: Of what the forward pass keeps for the backward pass, parameters, buffers and inputs left out.
        peak: The most at one time: parameters, buffers, inputs, activations, gradients.
    """

    parameters: int
    saved: int
    peak: int


@torch.inference_mode(False)
@torch.enable_grad()
def training_memory(
    module: nn.Module, inputs: torch.Tensor, loss: Callable[[Any], torch.Tensor] = lambda outputs: outputs.sum()
) -> TrainingMemory:
    """What a forward and a backward pass in training mode hold at once.

    Args:
        module: A network or a part of one; a copy of it is measured.
        inputs: A batch [batch, ...], on its device.
        loss: From the outputs to a number.

    Returns:
        The bytes.

    Raises:
        ResnetPathsError: If the loss is not one number that depends on a parameter.

    Example:
        >>> training_memory(nn.Linear(10, 5, bias=False), torch.zeros(100, 10)).parameters
        200
    """
    module, inputs = copy.deepcopy(module).train(), inputs.clone()
    module.zero_grad()
    given = [*module.parameters(), *module.buffers(), inputs]
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with _Alive() as alive:
        alive.see(given)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(module(inputs))
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            found = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise ResnetPathsError("loss", found, "a function to one number that depends on a parameter")
        value.backward()  # type: ignore[no-untyped-call]
    sizes = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in given}
    return TrainingMemory(
        parameters=sum(size for key, size in sizes.items() if key != _key(inputs)),
        saved=sum(size for key, size in saved.items() if key not in sizes),
        peak=alive.peak,
    )


def _key(tensor: torch.Tensor) -> int:
    """Names the memory behind a tensor, which its views share, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes behind all tensors that operations return, until the last one that uses them is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.see(tree_leaves(outputs))
        return outputs

    def see(self, values: list[Any]) -> None:
        """Count the memory behind tensors, unless it is counted."""
        for tensor in values:
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(_key(tensor))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._let_go, _key(tensor), storage.nbytes())

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

"""Measured costs of a module: parameters, multiply-adds and time of a forward pass, memory of a training step.

Memory is counted in bytes of tensors, by recording every tensor that torch allocates and frees, and is therefore the
same on every machine. Workspaces of kernels and memory that an allocator caches are not included.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.inputs import Inputs, checked_inputs, num_examples
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.signature import arguments_of

__all__ = ["ForwardCost", "TrainingMemory", "forward_cost", "training_memory"]


@dataclass(frozen=True)
class ForwardCost:
    """Cost of a forward pass.

    Attributes:
        num_parameters: Number of parameters, including frozen ones.
        num_multiply_adds: Multiply-adds of convolutions and matrix products, per example.
        microseconds: Median time per example, measured on a batch.
    """

    num_parameters: int
    num_multiply_adds: int
    microseconds: float


@torch.inference_mode()
def forward_cost(module: nn.Module, inputs: Inputs, *, min_seconds: float = 0.2) -> ForwardCost:
    """Measure the cost of a forward pass: count its operations and time it.

    Args:
        module: A block or a whole network, in eval mode.
        inputs: A batch on the module's device: a tensor [batch, ...], a tuple of positional arguments or a mapping of
            keyword arguments.
        min_seconds: Minimum total measurement time in seconds.

    Returns:
        The cost per example of the batch.

    Raises:
        ResnetPathsError: If the inputs have another form or contain no example, or if the module is in training mode
            and computes something else there, such as BatchNorm.
    """
    args, kwargs = arguments_of(checked_inputs(inputs))
    batch = num_examples((args, kwargs))
    if not batch:
        raise ResnetPathsError("inputs", "no examples", "at least one example")
    require_eval_mode("module", module)
    with FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    called = {"module": module, "args": args, "kwargs": kwargs}
    timer = Timer("module(*args, **kwargs)", globals=called, num_threads=torch.get_num_threads())
    median = timer.blocked_autorange(min_run_time=min_seconds).median
    return ForwardCost(
        sum(p.numel() for p in module.parameters()),
        counter.get_total_flops() // 2 // batch,  # the counter counts a multiply-add as two operations
        1e6 * median / batch,
    )


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one forward and backward pass, in bytes of tensors.

    Attributes:
        parameters: Bytes of parameters and buffers.
        saved: Bytes saved by the forward pass for the backward pass, without parameters, buffers and inputs.
        peak: Maximum bytes at any time: parameters, buffers, inputs, activations and gradients.
    """

    parameters: int
    saved: int
    peak: int


@torch.inference_mode(False)
@torch.enable_grad()
def training_memory(
    module: nn.Module, inputs: torch.Tensor, loss: Callable[[Any], torch.Tensor] = lambda outputs: outputs.sum()
) -> TrainingMemory:
    """Measure the memory of a forward and a backward pass in training mode.

    Args:
        module: A network or a part of one; a copy of it is measured.
        inputs: A batch [batch, ...] on the module's device.
        loss: Function from the outputs to a scalar tensor.

    Returns:
        The memory in bytes.

    Raises:
        ResnetPathsError: If the loss is not a scalar that depends on a parameter.

    Example:
        >>> training_memory(nn.Linear(10, 5, bias=False), torch.zeros(100, 10)).parameters
        200
    """
    module, inputs = copy.deepcopy(module).train(), inputs.clone()
    module.zero_grad()
    before = [*module.parameters(), *module.buffers(), inputs]
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with _Alive() as alive:
        alive.see(before)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            value = loss(module(inputs))
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            found = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else value
            raise ResnetPathsError("loss", found, "a function that returns a scalar that depends on a parameter")
        value.backward()  # type: ignore[no-untyped-call]
    sizes = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in before}
    return TrainingMemory(
        parameters=sum(size for key, size in sizes.items() if key != _key(inputs)),
        saved=sum(size for key, size in saved.items() if key not in sizes),
        peak=alive.peak,
    )


def _key(tensor: torch.Tensor) -> int:
    """Identifies the storage of a tensor, which its views share, during its lifetime."""
    return int(tensor.untyped_storage()._cdata)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages of all tensors that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Iterable[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        outputs = func(*args, **(kwargs or {}))
        self.see(tree_leaves(outputs))
        return outputs

    def see(self, values: Iterable[object]) -> None:
        """Count the storages of tensors that are not yet counted."""
        for tensor in values:
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(_key(tensor))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, _key(tensor), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

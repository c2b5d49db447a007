"""What a module costs to run, measured: parameters, multiply-adds, time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import refuse_training_mode
from resnet_paths.core.inputs import checked_inputs, num_examples
from resnet_paths.core.signature import arguments_of

__all__ = ["ForwardCost", "forward_cost"]


@dataclass(frozen=True)
class ForwardCost:
    """What one forward pass costs.

    Attributes:
        num_parameters: Numbers in its parameters, those that are frozen among them.
        num_multiply_adds: Multiply-adds of convolutions and matrix products, for one example.
        microseconds: Median time for one example, within a batch.
    """

    num_parameters: int
    num_multiply_adds: int
    microseconds: float


@torch.inference_mode()
def forward_cost(module: nn.Module, inputs: Any, *, min_seconds: float = 0.2) -> ForwardCost:
    """What a forward pass costs: operations counted, time measured, nothing taken from a formula.

    Args:
        module: A block or a whole network, in eval mode.
        inputs: A batch on its device: a tensor [batch, ...], a tuple of positional arguments or a mapping of keyword
            arguments.
        min_seconds: For how long to measure the time, at least.

    Returns:
        The cost, for one example of the batch.

    Raises:
        ResnetPathsError: If the inputs are of no such form, or hold no example; if the module is in training mode and
            that matters, as to BatchNorm.
    """
    args, kwargs = arguments_of(checked_inputs(inputs))
    batch = num_examples((args, kwargs))
    if not batch:
        raise ResnetPathsError("inputs", "no examples", "at least one example")
    refuse_training_mode("module", module)
    with FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    called = {"module": module, "args": args, "kwargs": kwargs}
    timer = Timer("module(*args, **kwargs)", globals=called, num_threads=torch.get_num_threads())
    median = timer.blocked_autorange(min_run_time=min_seconds).median
    return ForwardCost(
        sum(p.numel() for p in module.parameters()),
        counter.get_total_flops() // 2 // batch,  # the counter takes a multiply-add as two operations
        1e6 * median / batch,
    )

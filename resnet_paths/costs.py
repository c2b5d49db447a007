"""What a module costs to run, measured: parameters, multiply-adds, time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from resnet_paths.errors import ResnetPathsError

__all__ = ["ForwardCost", "forward_cost"]


@dataclass(frozen=True)
class ForwardCost:
    """What one forward pass costs.

    Attributes:
        num_parameters: Numbers that are trained.
        num_multiply_adds: Multiply-adds of convolutions and matrix products, for one example.
        microseconds: Median time for one example, within a batch.
    """

    num_parameters: int
    num_multiply_adds: int
    microseconds: float


@torch.inference_mode()
def forward_cost(module: nn.Module, inputs: torch.Tensor, *, min_seconds: float = 0.2) -> ForwardCost:
    """What a forward pass costs: operations counted, time measured, nothing taken from a formula.

    Args:
        module: A block or a whole network, in eval mode.
        inputs: A batch [batch, ...] on its device.
        min_seconds: For how long to measure the time, at least.

    Returns:
        The cost, for one example of the batch.

    Raises:
        ResnetPathsError: If there is no example.
    """
    if not len(inputs):
        raise ResnetPathsError("inputs", list(inputs.shape), "at least one example")
    with FlopCounterMode(display=False) as counter:
        module(inputs)
    timer = Timer("module(inputs)", globals={"module": module, "inputs": inputs}, num_threads=torch.get_num_threads())
    median = timer.blocked_autorange(min_run_time=min_seconds).median
    return ForwardCost(
        sum(p.numel() for p in module.parameters()),
        counter.get_total_flops() // 2 // len(inputs),  # the counter takes a multiply-add as two operations
        1e6 * median / len(inputs),
    )

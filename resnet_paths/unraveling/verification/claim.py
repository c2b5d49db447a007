"""What is verified: a chain beside the model and the graph that it was read from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensor

from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.signature import Signature, chosen
from resnet_paths.unraveling.parts import Part
from resnet_paths.unraveling.tracing import Trace

__all__ = ["Claim", "has_values"]


@dataclass(frozen=True)
class Claim:
    """A chain that claims to be a model.

    Attributes:
        chain: The chain.
        model: The model.
        signature: How both are called.
        tensors: The tensors of the example.
        output: Which of the model's outputs the chain returns, as in `resnet_paths.unravel`.
        expected: That output on the example.
        traced: The graph that the chain was cut from; None for a chain of named blocks, or one that was kept.
        parts: Its blocks on the graph; empty where there is none.
        returned: The chain's output on the example, where it has been checked already.
        dtypes: The floating dtypes of the graph, of a chain that was kept; None where the graph tells.
    """

    chain: ResidualChain
    model: nn.Module
    signature: Signature
    tensors: tuple[torch.Tensor, ...]
    output: str | int | None
    expected: torch.Tensor
    traced: Trace | None = None
    parts: Sequence[Part] = ()
    returned: torch.Tensor | None = None
    dtypes: set[torch.dtype] | None = None

    @property
    def batch(self) -> int:
        """Number of examples in the example inputs."""
        return max((x.shape[0] for x in self.tensors if x.dim()), default=1)

    def run_chain(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """The chain's output, [batch, ...]; inputs are copied before: a stem of named blocks may write to them."""
        args, kwargs = self.signature.arguments(tensor.clone() for tensor in tensors)
        output: torch.Tensor = self.chain(*args, **kwargs)
        return output

    def run_model(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """The model's output, [batch, ...]; buffers and inputs that the model writes to are copied before."""
        return chosen(run_model(self.model, self.signature, tensors), self.output)


def run_model(model: nn.Module, signature: Signature, tensors: Iterable[torch.Tensor]) -> object:
    """What a model returns.

    Args:
        model: The model; it is not changed, since it runs on copies of the inputs and of its buffers.
        signature: How it is called.
        tensors: The tensors among its arguments.

    Returns:
        Whatever it returns.
    """
    args, kwargs = signature.arguments(tensor.clone() for tensor in tensors)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, buffers, args, kwargs)


def has_values(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether tensors hold numbers, which those on the device ``"meta"`` and fake tensors do not."""
    return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)

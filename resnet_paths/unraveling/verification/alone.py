"""The model and the chain on one example alone, unlike those that were traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from resnet_paths._utils.errors import UnravelError
from resnet_paths.unraveling.tracing import name_of, user_frame
from resnet_paths.unraveling.verification.claim import Claim
from resnet_paths.unraveling.verification.outputs import agree

__all__ = ["Alone", "Beside", "differentiable", "run_or_refuse", "unlike"]


@dataclass(frozen=True)
class Alone:
    """One example, and what the model and the chain return for it.

    Attributes:
        inputs: The tensors of the example, one row for each tensor with a row for each example. Floating-point tensors
            are leaves that require a gradient.
        of_model: The model's output, with its autograd graph.
        of_chain: The chain's output, with its autograd graph.
        beside: The chain's output for the same example in a batch of two.
    """

    inputs: tuple[torch.Tensor, ...]
    of_model: torch.Tensor
    of_chain: torch.Tensor
    beside: torch.Tensor

    @classmethod
    def of(cls, claim: Claim, beside: Beside) -> Alone:
        """Run both.

        Args:
            claim: The chain and the model.
            beside: Two examples, and the chain's output for them in one batch.

        Returns:
            Both outputs for the second of them, or for the first where the model does not take the second.

        Raises:
            UnravelError: If the model or the chain does not take one example alone, or they differ.
        """
        second, first = beside.rows(1), beside.rows(0)
        try:
            inputs, of_chain = _leaves(second[0]), second[1]
            of_model = claim.run_model(inputs)
        except Exception:  # what is made up may be nothing that the model takes
            inputs, of_chain = _leaves(first[0]), first[1]
            of_model = run_or_refuse(claim, claim.run_model, inputs, "the first example alone")
        alone = cls(inputs, of_model, run_or_refuse(claim, claim.run_chain, inputs, "one example alone"), of_chain)
        if not agree(alone.of_chain.detach(), of_model.detach()):
            raise UnravelError(
                "model",
                f"{name_of(claim.model)}: on one example alone the chain's output differs from the model's",
                "a model that does the same for every batch size and all values of its inputs",
                "Look for code that reads sizes or values of tensors, such as `if x.shape[0] == 1` or `x.item()`.",
            )
        return alone


@dataclass(frozen=True)
class Beside:
    """Two examples in one batch.

    Attributes:
        batched: For each input whether it has a row for each example, and not one row for all.
        inputs: The tensors, two rows each where they have a row for each example.
        output: The chain's output for them.
    """

    batched: tuple[bool, ...]
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor

    def rows(self, index: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Inputs and output of one of the two."""
        each = zip(self.inputs, self.batched, strict=True)
        inputs = tuple(x[index : index + 1] if batched else x for x, batched in each)
        half = len(self.output) // 2
        return inputs, self.output[index * half : (index + 1) * half]


def run_or_refuse(
    claim: Claim,
    run: Callable[[Iterable[torch.Tensor]], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    what: str,
) -> torch.Tensor:
    """The output of the model or of the chain; an error raised by either is explained.

    Args:
        claim: The chain and the model.
        run: One of its two methods.
        inputs: The tensors.
        what: What they are, for the message.

    Returns:
        The output.

    Raises:
        UnravelError: If it fails.
    """
    try:
        return run(inputs)
    except Exception as error:
        if "inference tensor" in str(error).lower():  # autograd has no class of its own for these errors
            raise UnravelError(
                "model",
                f"{name_of(claim.model)}, which computes with tensors made in torch.inference_mode()",
                "operations that autograd can record",
                f"It failed at {user_frame(error, claim.model)}. Write a part without gradient as f(x.detach()), "
                "outside torch.inference_mode(), and copy tensors that were made in it by clone().",
            ) from error
        raise UnravelError(
            "model",
            f"{name_of(claim.model)} fails on {what}: {type(error).__name__}: {error}",
            "a model that takes any number of examples, in dimension 0 of every tensor",
            f"It failed at {user_frame(error, claim.model)}. If dimension 0 holds the parts of one example, such as "
            "the nodes of a graph, add a dimension for the batch before it.",
        ) from error


def _leaves(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors)


def unlike(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another example of the same kind: flipped along its last dimension, and not the same.

    Args:
        tensor: An input; not changed.
        generator: Source of the noise on floating-point numbers.

    Returns:
        A new tensor. Floating-point numbers get noise from [0, 1). Integers and booleans stay those of the example,
        such as tokens that a model knows; but the last are 0, or 1 where they were, since order alone may not matter.
    """
    other = tensor.flip(-1) if tensor.dim() else tensor.clone()
    if other.is_floating_point():
        return other + torch.rand(other.shape, generator=generator).to(other)
    last = other[..., -1:] if other.dim() else other
    last.copy_(last == 0)
    return other


@contextlib.contextmanager
def differentiable(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Autograd switched on, also for some tensors that require no gradient otherwise.

    Args:
        tensors: Parameters.

    Yields:
        Nothing; afterwards everything is as it was.
    """
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)

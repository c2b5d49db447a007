"""The forward pass of some examples: the states between blocks, and the context that the blocks read.

A batch is split so that stacks of cotangents stay within a budget of memory; examples do not meet in eval mode, so the
split changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths._utils.threads import refuse_fork_after_autograd
from resnet_paths.core.backward.linearize import Context
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import Inputs, each_tensor, num_examples, refusing_other_dtypes, require_movable, split
from resnet_paths.core.parts import call_part
from resnet_paths.core.placement import device_of
from resnet_paths.core.signature import Signature, arguments_of

__all__ = ["STACKS_AT_ONCE", "ForwardPass", "forward", "prepared", "split_to_fit", "states_from"]

STACKS_AT_ONCE = 4
"""Stacks at a block's output and input, after its post and pre, and what torch allocates beside them."""

T = TypeVar("T")

_INSIDE_A_BLOCK = 16  # states that a block keeps inside while it is linearized


@torch.no_grad()
def forward(chain: ResidualChain, inputs: Inputs) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The states between blocks of an ordinary forward pass, and the context.

    Args:
        chain: The chain.
        inputs: A batch, as the chain is called: a tensor, a tuple or a mapping.

    Returns:
        The output of the stem, then that of each block; the context by name.

    Raises:
        ResnetPathsError: If a value is not finite; the first block whose output holds one is named.
    """
    # Parts written by hand may begin with an operation in place: they get copies.
    args, kwargs = arguments_of(inputs if chain.eval_only else each_tensor(torch.clone, inputs))
    state, context = chain.begin(*args, **kwargs)
    _check_finite("the stem", state)
    return states_from(state, chain, context), context


@torch.no_grad()
def states_from(state: torch.Tensor, chain: ResidualChain, context: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The state before the first block, and after each.

    Args:
        state: What the first block reads.
        chain: The chain.
        context: What the blocks read in addition to the states.

    Returns:
        The states.

    Raises:
        ResnetPathsError: If a value is not finite; the first block whose output holds one is named.
    """
    states = [state]
    for index, block in enumerate(chain):
        own = states[-1] if chain.eval_only else states[-1].clone()
        with refusing_other_dtypes(own, "chain", block):
            states.append(call_part(block, own, context))
        _check_finite(f"block {block.name or index!r}", states[-1])
    return states


def _check_finite(place: str, state: torch.Tensor) -> None:
    if state.is_floating_point() and not bool(torch.isfinite(state).all()):
        raise ResnetPathsError(
            "inputs",
            f"NaN or infinity in the output of {place}",
            "inputs whose activations are all finite",
            "In half precision, large activations overflow: try float32.",
        )


def prepared(chain: ResidualChain, inputs: Inputs, targets: T) -> tuple[Inputs, T]:
    """Inputs and targets of a batch as the chain and autograd take them, on the chain's device.

    Args:
        chain: The chain.
        inputs: A batch, as the chain is called: a tensor, a tuple or a mapping.
        targets: What belongs to it, of any kind.

    Returns:
        Inputs and targets.

    Raises:
        ResnetPathsError: If a tensor has no values, or autograd does not run in this process.
    """
    refuse_fork_after_autograd()
    device = device_of(chain)
    require_movable("inputs", inputs, device)
    require_movable("targets", targets, device)
    inputs, targets = each_tensor(lambda t: _ordinary(t.to(device)), (inputs, targets))
    return each_tensor(_laid_out, inputs) if chain.eval_only else inputs, targets


def split_to_fit(
    chain: ResidualChain,
    inputs: Inputs,
    targets: T,
    memory_budget: int,
    rows: int | Sequence[int],
    *,
    down_to: int = 0,
    beside: int = 0,
) -> Iterator[tuple[Inputs, T]]:
    """Parts of a batch whose states and stacks of cotangents fit the memory budget.

    Args:
        chain: The chain.
        inputs: From `prepared`.
        targets: Likewise.
        memory_budget: Bytes.
        rows: How many cotangents of one example are carried at once; or a number for the output of the stem and of each
            block.
        down_to: The block at whose input the backward pass ends.
        beside: Bytes of each example that one row takes elsewhere.

    Yields:
        Inputs and targets of each part, in order.
    """
    one, _ = next(split(inputs, targets, 1))
    states, context = forward(chain, one)
    of_context = sum(t.numel() * t.element_size() for t in context.values())
    sizes = [state.numel() * state.element_size() + of_context for state in states]
    if isinstance(rows, int):
        # A row for each block passed so far, up to `rows` in all.
        most, each = rows, max(rows // len(states), 1)
        num_rows: Sequence[int] = [min(rows, (len(states) - i) * each) for i in range(len(states))]
    else:
        most, num_rows = max(rows), rows
    stacks = max(n * size for n, size in zip(num_rows[down_to:], sizes[down_to:], strict=True)) + most * beside
    needed = sum(sizes) + _INSIDE_A_BLOCK * max(sizes) + STACKS_AT_ONCE * stacks
    yield from split(inputs, targets, max(memory_budget // needed, 1))


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that autograd can work with, also where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _laid_out(inputs: torch.Tensor) -> torch.Tensor:
    """Images with their channels last, the layout in which stacks of cotangents are convolved fastest."""
    if inputs.dim() == 4 and inputs.is_floating_point() and inputs.dtype != torch.float64:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


class ForwardPass:
    """Some examples on their way through a chain.

    Args:
        chain: The chain.
        inputs: From `prepared`.
        down_to: The block at whose input the backward pass ends; what the stem makes has a gradient if it is the first.
        of_input: Whether it goes on through the stem.

    Attributes:
        num_examples: Number of examples.
        states: The output of the stem, then that of each block.
        context: What blocks and head read in addition to that, with a row for each example where it carries a gradient.
        first_states: Names of the context that is the output of the stem itself.
    """

    def __init__(self, chain: ResidualChain, inputs: Inputs, *, down_to: int = 0, of_input: bool = False) -> None:
        self.inputs = inputs
        self.num_examples = num_examples(inputs)
        self.states, values = forward(chain, inputs)
        self.device = self.states[0].device
        self.first_states = [name for name, value in values.items() if value is self.states[0]]
        depending = _depending_on(chain, inputs) if values and not down_to else set()
        carrying = [name for name in values if not down_to and (name in depending or name in self.first_states)]
        rows = {name: self._row_for_each(name, values[name], of_input) for name in carrying}
        self.context = Context({**values, **rows}, tuple(carrying))

    def _row_for_each(self, name: str, value: torch.Tensor, of_input: bool) -> torch.Tensor:
        shared = value.dim() > 0 and len(value) == 1 and not of_input
        if not shared and (not value.dim() or len(value) != self.num_examples):
            raise ResnetPathsError(
                "inputs",
                f"{name!r} {list(value.shape)}, which the stem makes of them for all blocks",
                "inputs of which everything is made for each example alone",
                "All examples share it: none has a gradient of its own. Take the output of a block.",
            )
        return value.expand(self.num_examples, *value.shape[1:])


def _depending_on(chain: ResidualChain, inputs: Inputs) -> set[str]:
    """Names of the context that depends on inputs with a floating dtype."""
    leaves = each_tensor(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), inputs)
    sources = [t for t in Signature.of(*arguments_of(leaves))[1] if t.requires_grad]
    with torch.enable_grad():
        args, kwargs = arguments_of(each_tensor(torch.clone, leaves))
        context = chain.begin(*args, **kwargs)[1]

    def depends(value: torch.Tensor) -> bool:
        if not value.requires_grad or not sources:
            return False
        found = torch.autograd.grad(value, sources, torch.ones_like(value), retain_graph=True, allow_unused=True)
        return any(slope is not None for slope in found)

    return {name for name, value in context.items() if depends(value)}

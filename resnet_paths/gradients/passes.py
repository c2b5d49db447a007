"""One batch at a place of interest: what the instruments of `resnet_paths.gradients` measure, as arrays.

A batch is split so that stacks of cotangents stay within a budget of memory; examples do not meet in eval mode, so the
split changes nothing. Norms are float64, whatever the dtype of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.chain import ResidualChain, refuse_other_than_chain, refuse_training_mode
from resnet_paths.core.inputs import each_tensor, num_examples, split
from resnet_paths.core.paths import Choices, Path
from resnet_paths.core.placement import device_of
from resnet_paths.core.signature import Signature, arguments_of
from resnet_paths.gradients.adjoints import each_part, linearize
from resnet_paths.gradients.backward import (
    Rules,
    head_cotangent,
    parameter_cotangents,
    parts_through_blocks,
    pull_back,
    pull_paths,
    states_of,
)
from resnet_paths.gradients.cotangents import Stack, parts_of

__all__ = ["Place", "Point", "num_block_vjps"]

# Stacks at a block's output and input, behind its post and pre, and what torch allocates beside them.
_STACKS_AT_ONCE = 4
_INSIDE_A_BLOCK = 16  # states that a block keeps inside while it is linearized


@dataclass(frozen=True)
class Place:
    """Where gradients are wanted.

    Attributes:
        chain: The chain.
        down_to: The block at whose input the backward pass through blocks ends.
        of_input: Whether it goes on through the stem.
        of_parameters: Whether it ends in the parameters of block ``down_to - 1``.
    """

    chain: ResidualChain
    down_to: int = 0
    of_input: bool = False
    of_parameters: bool = False

    @classmethod
    def of(cls, chain: ResidualChain, with_respect_to: Any) -> Place:
        """The place that a caller's `with_respect_to` names, once the chain is known to be fit for gradients.

        Args:
            chain: The chain.
            with_respect_to: ``"input"``, ``"stem"``, a block, or ``("parameters", block)``.

        Returns:
            The place.

        Raises:
            ResnetPathsError: If the chain is none or in training mode, or there is no such place.
        """
        refuse_other_than_chain("chain", chain)
        refuse_training_mode("chain", chain)
        if with_respect_to == "input":
            return cls(chain, of_input=True)
        if with_respect_to == "stem":
            return cls(chain)
        if isinstance(with_respect_to, tuple):
            if len(with_respect_to) != 2 or with_respect_to[0] != "parameters":
                raise ResnetPathsError("with_respect_to", with_respect_to, "('parameters', block) or another place")
            block = chain.block_index(with_respect_to[1])
            if not any(p.is_floating_point() for p in chain[block].parameters()):
                raise ResnetPathsError("with_respect_to", with_respect_to, "a block that has parameters")
            return cls(chain, block + 1, of_parameters=True)
        return cls(chain, chain.block_index(with_respect_to) + 1)

    @property
    def path_choices(self) -> Choices:
        """What the blocks above the place offer to a path; see `resnet_paths.core.paths`."""
        return self.chain.path_choices[self.down_to :]

    def points(
        self, inputs: Any, targets: Any, loss: Callable[[Any, Any], torch.Tensor] | None, memory_budget: int, rows: int
    ) -> Iterator[Point]:
        """The batch in parts that fit the memory budget.

        Args:
            inputs: A batch, as the chain is called: a tensor, a tuple or a mapping.
            targets: What `loss` takes beside the logits.
            loss: From logits and targets to losses [batch]; cross-entropy if None.
            memory_budget: Bytes.
            rows: How many cotangents of one example are carried at once.

        Yields:
            A point for each part of the batch, in order.

        Raises:
            ResnetPathsError: If the inputs cannot be differentiated or hold no example.
        """
        chain = self.chain
        device = device_of(chain)
        inputs, targets = each_tensor(lambda t: _ordinary(t.to(device)), (inputs, targets))
        if chain.eval_only:
            inputs = each_tensor(_laid_out, inputs)
        if self.of_input:
            _refuse_without_gradient(inputs)
        if not num_examples(inputs):
            raise ResnetPathsError("inputs", "no examples", "at least one example")
        one, _ = next(split(inputs, targets, 1))
        size = self._examples_at_once(states_of(chain, one), memory_budget, rows)
        for part, some in split(inputs, targets, size):
            yield Point(self, part, some, loss or _cross_entropy)

    def _examples_at_once(self, states: Sequence[Any], memory_budget: int, rows: int) -> int:
        sizes = [sum(t.numel() * t.element_size() for t in parts_of(state)) for state in states]
        # A row for each block passed so far, up to `rows` in all.
        num_rows = [min(rows, (len(states) - i) * max(rows // len(states), 1)) for i in range(len(states))]
        stacks = max(n * size for n, size in zip(num_rows[self.down_to :], sizes[self.down_to :], strict=True))
        if self.of_parameters:
            stacks += rows * sum(p.numel() * p.element_size() for p in self.chain[self.down_to - 1].parameters())
        needed = sum(sizes) + _INSIDE_A_BLOCK * max(sizes) + _STACKS_AT_ONCE * stacks
        return max(memory_budget // needed, 1)


def _refuse_without_gradient(inputs: Any) -> None:
    """Refuse inputs that are no floating numbers, or that are not each example's own."""
    for tensor in Signature.of(*arguments_of(inputs))[1]:
        why = "" if tensor.is_floating_point() else f"inputs of {tensor.dtype} have no gradient"
        if not tensor.dim() or len(tensor) != num_examples(inputs):
            why = why or "an input that all examples share has no gradient of theirs"
        if why:
            raise ResnetPathsError(
                "with_respect_to",
                "'input'",
                f"another place: {why}",
                "Take with_respect_to='stem', which is the output of the embedding.",
            )


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that autograd can work with, also where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _laid_out(inputs: torch.Tensor) -> torch.Tensor:
    """Images with their channels last, the layout in which stacks of cotangents are convolved fastest."""
    if inputs.dim() == 4 and inputs.is_floating_point() and inputs.dtype != torch.float64:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def _cross_entropy(logits: Any, targets: Any) -> torch.Tensor:
    if not isinstance(targets, torch.Tensor):
        raise ResnetPathsError(
            "targets",
            type(targets).__name__,
            "class indices [batch], or another loss",
            "Pass targets, or loss=lambda logits, targets: ... that needs none.",
        )
    try:
        return F.cross_entropy(logits, targets, reduction="none")
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ResnetPathsError(
            "targets",
            f"{targets.dtype} {list(targets.shape)}",
            "what cross-entropy takes with the network's logits",
            f"It answered: {error}",
        ) from error


class Point:
    """Some examples at a place: their states between blocks, and what can be pulled back to it."""

    def __init__(self, place: Place, inputs: Any, targets: Any, loss: Callable[[Any, Any], torch.Tensor]) -> None:
        self.place = place
        self.inputs = inputs
        self.num_examples = num_examples(inputs)
        self.states = states_of(place.chain, inputs)
        self.device = parts_of(self.states[0])[0].device
        self.cotangent = head_cotangent(place.chain, self.states[-1], lambda logits: loss(logits, targets))

    def by_length(
        self, longest: int, num_draws: int = 1, draw_signs: Callable[[], torch.Tensor] | None = None
    ) -> Stack:
        """Gradients at the place, a row a path length, up to `longest`."""
        rules = Rules(longest=longest, draw_signs=draw_signs)
        return self._at_place(self._through_blocks(Stack.of(self.cotangent, num_draws=num_draws), rules))

    @cached_property
    def whole(self) -> Stack:
        """The whole gradient at the place, in one row."""
        return self._at_place(self._through_blocks(Stack.of(self.cotangent), Rules(counted=False)))

    def of_paths(self, paths: Sequence[Path]) -> Stack:
        """Gradients of single paths at the place, a row a path."""
        start = Stack.of(self.cotangent, num_rows=len(paths))
        place = self.place
        return self._at_place(pull_paths(place.chain, self.states, start, paths, down_to=place.down_to))

    def through_branches(self) -> Stack:
        """The whole gradient at the place, then its part through each block's branch, last block first."""
        place = self.place
        return self._at_place(parts_through_blocks(place.chain, self.states, self.cotangent, down_to=place.down_to))

    def by_depth(self) -> Iterator[Stack]:
        """The whole gradient at the last block's output, then at each block's input, last block first."""
        place, stack = self.place, Stack.of(self.cotangent)
        yield stack
        for index in reversed(range(place.down_to, len(place.chain))):
            stack = pull_back(place.chain, self.states, stack, Rules(counted=False), down_to=index, up_from=index + 1)
            yield stack

    def by_stage_lengths(self, stages: Sequence[range], memory_budget: int) -> Iterator[tuple[tuple[int, ...], Stack]]:
        """Gradients at the place by the length of the path in each stage, one by one; stages first to last."""
        yield from self._down_stages(list(stages), Stack.of(self.cotangent), [()], memory_budget)

    def _down_stages(
        self, stages: list[range], stack: Stack, lengths: list[tuple[int, ...]], memory_budget: int
    ) -> Iterator[tuple[tuple[int, ...], Stack]]:
        if not stages:
            arrived = self._at_place(stack)
            for draw, key in enumerate(lengths):
                values = each_part(lambda t: t[:, draw : draw + 1], arrived.values)  # noqa: B023 - used at once
                yield key, Stack(values, arrived.exponents[:, draw : draw + 1])
            return
        *earlier, stage = stages
        # Paths that differ in later stages do not meet again: some at a time, to stay within the memory.
        widest = max(sum(t.numel() * t.element_size() for t in parts_of(self.states[i])) for i in stage)
        at_once = max(memory_budget // (_STACKS_AT_ONCE * (len(stage) + 1) * widest), 1)
        for start in range(0, len(lengths), at_once):
            some = slice(start, start + at_once)
            group = Stack(each_part(lambda t: t[:, some], stack.values), stack.exponents[:, some])  # noqa: B023
            pulled = pull_back(self.place.chain, self.states, group, Rules(), down_to=stage.start, up_from=stage.stop)
            keys = [(pulled.shortest + k, *key) for k in range(len(pulled)) for key in lengths[some]]
            flat = each_part(lambda t: t.flatten(0, 1)[None], pulled.values)
            yield from self._down_stages(
                earlier, Stack(flat, pulled.exponents.flatten(0, 1)[None]), keys, memory_budget
            )

    def _through_blocks(self, stack: Stack, rules: Rules) -> Stack:
        return pull_back(self.place.chain, self.states, stack, rules, down_to=self.place.down_to)

    @torch.no_grad()
    def _at_place(self, stack: Stack) -> Stack:
        place = self.place
        if place.of_parameters:
            block = place.down_to - 1
            return parameter_cotangents(place.chain[block], self.states[block], stack)
        if not place.of_input:
            return stack
        stem = place.chain.stem
        signature, tensors = Signature.of(*arguments_of(self.inputs))
        is_one = signature.is_plain and len(tensors) == 1
        _, pullback = linearize(stem, tensors[0]) if is_one else linearize(_OfTensors(stem, signature), tensors)
        return stack.pulled(pullback).renormalised()

    @torch.no_grad()
    def norms(self, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
        """Euclidean norms of a stack's rows, float64 [length, draw, batch], and where they are not 0 but stand so."""
        squares = wide(torch.zeros_like(stack.exponents))
        for part in parts_of(stack.values):
            for k, row in enumerate(part):  # row by row: a float64 copy of all would be twice the stack
                squares[k] += wide(row.flatten(2)).square().sum(2) if row.dim() > 2 else wide(row).square()
        mantissas = squares.sqrt().cpu().numpy()
        norms = np.ldexp(mantissas, stack.exponents.cpu().numpy())
        return norms, (mantissas > 0) & (norms == 0)

    @torch.no_grad()
    def shares(self, stack: Stack, whole: Stack) -> np.ndarray:
        """<row, G> / <G, G> for the whole gradient G, of the first draw; float64 [length, batch], NaN where G is 0."""
        dots = wide(torch.zeros_like(stack.exponents[:, 0]))
        squares = dots.new_zeros(self.num_examples)
        for part, total in zip(parts_of(stack.values), parts_of(whole.values), strict=True):
            direction = wide(total[0, 0]).reshape(self.num_examples, -1)
            squares += direction.square().sum(1)
            for k, row in enumerate(part[:, 0]):
                dots[k] += (wide(row.reshape(self.num_examples, -1)) * direction).sum(1)
        powers = (stack.exponents[:, 0] - whole.exponents[0, 0]).cpu().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: np.ndarray = np.ldexp((dots / squares).cpu().numpy(), powers)
        return shares


class _OfTensors(nn.Module):
    """A stem as a module of the tensors among its arguments."""

    def __init__(self, stem: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.stem = stem
        self.signature = signature
        self.training = stem.training

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        args, kwargs = self.signature.arguments(tensors)
        return self.stem(*args, **kwargs)


def num_block_vjps(choices: Choices, longest: int) -> int:
    """Block VJPs that the split by path length costs for an example; n (n + 1) / 2 for n residual blocks.

    Args:
        choices: What the blocks offer to a path.
        longest: The longest paths of interest.

    Returns:
        Their number.

    Example:
        >>> num_block_vjps(((False, True),) * 54, 54)
        1485
    """
    return _vjps(choices, (0, 0), longest)[0]


def _vjps(choices: Choices, lengths: tuple[int, int], longest: int) -> tuple[int, tuple[int, int]]:
    """The number of VJPs from a stack with these (shortest, longest) lengths, and the lengths at the other end."""
    count, (low, high) = 0, lengths
    for offered in reversed(choices):
        ends = [(low, high)] if any(choice is False or choice == 0 for choice in offered) else []
        top = min(high, longest - 1)
        for choice in offered if top >= low else ():
            if isinstance(choice, tuple):
                inner, (a, b) = _vjps(choice, (low, top), longest - 1)
                count += inner
                ends.append((a + 1, b + 1))
            elif choice:
                count += top - low + 1
                ends.append((low + 1, top + 1))
        low, high = min((a for a, _ in ends), default=0), max((b for _, b in ends), default=-1)
    return count, (low, high)

"""One batch at a place of interest: what the instruments of `resnet_paths.gradients` measure, as arrays.

A batch is split so that stacks of cotangents stay within a budget of memory; examples do not meet in eval mode, so the
split changes nothing. Norms are float64, whatever the dtype of the network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from resnet_paths._utils.arguments import require_function
from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.backward.completions import nothing_below
from resnet_paths.core.backward.cotangents import Cotangents, Stack, aligned
from resnet_paths.core.backward.forward import STACKS_AT_ONCE, ForwardPass, prepared, split_to_fit
from resnet_paths.core.backward.gains import Gains, gains
from resnet_paths.core.backward.linearize import linearize, linearize_all
from resnet_paths.core.backward.populations import Choose, Population, pull_population
from resnet_paths.core.backward.recursion import (
    Rules,
    head_cotangents,
    parameter_cotangents,
    parts_through_blocks,
    pull_back,
    pull_paths,
)
from resnet_paths.core.backward.tangents import DIFFERENTIABLE_PULLBACKS, pushed_all
from resnet_paths.core.backward.through_branches import Tangents, products_through_branches
from resnet_paths.core.chain import ResidualChain, require_chain
from resnet_paths.core.inputs import LABELS_ARE_APART, Inputs, each_tensor, num_examples, split
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.paths import Choices, Path
from resnet_paths.core.signature import Signature, arguments_of
from resnet_paths.gradients.losses import Loss, checked_losses, cross_entropy

__all__ = ["Place", "Point", "num_block_vjps"]


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
    def of(cls, chain: ResidualChain, with_respect_to: str | int | tuple[str, str | int]) -> Place:
        """The place that a caller's `with_respect_to` names, once the chain is known to be fit for gradients.

        Args:
            chain: The chain.
            with_respect_to: ``"input"``, ``"stem"``, a block, or ``("parameters", block)``.

        Returns:
            The place.

        Raises:
            ResnetPathsError: If the chain is not a `ResidualChain`, is in training mode, or there is no such place.
        """
        require_chain("chain", chain)
        require_eval_mode("chain", chain)
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

    @classmethod
    def of_states(cls, chain: ResidualChain, with_respect_to: str | int | tuple[str, str | int]) -> Place:
        """The place, for functions without gradients with respect to parameters.

        Args:
            chain: The chain.
            with_respect_to: ``"input"``, ``"stem"`` or a block.

        Returns:
            The place.

        Raises:
            ResnetPathsError: As `of`, and if the place is the parameters of a block.
        """
        place = cls.of(chain, with_respect_to)
        if place.of_parameters:
            raise ResnetPathsError("with_respect_to", with_respect_to, "'input', 'stem' or a block")
        return place

    @property
    def above(self) -> ResidualChain:
        """The chain of the blocks above the place."""
        return self.chain.with_blocks(list(self.chain)[self.down_to :])

    def points(
        self, inputs: Inputs, targets: object, loss: Loss | None, memory_budget: int, rows: int
    ) -> Iterator[Point]:
        """The batch in parts that fit the memory budget.

        Args:
            inputs: A batch, as the chain is called: a tensor, a tuple or a mapping.
            targets: What `loss` takes in addition to the logits.
            loss: From logits and targets to losses [batch]; cross-entropy if None.
            memory_budget: Bytes.
            rows: How many cotangents of one example are carried at once.

        Yields:
            A point for each part of the batch, in order.

        Raises:
            ResnetPathsError: If the inputs cannot be differentiated or hold no example.
        """
        chain = self.chain
        if loss is not None:
            require_function("loss", loss, "a function from outputs and targets to losses [batch], or None")
        inputs, targets = prepared(chain, inputs, targets)
        if self.of_input:
            _refuse_without_gradient(inputs)
        beside = 0
        if self.of_parameters:
            beside = sum(p.numel() * p.element_size() for p in chain[self.down_to - 1].parameters())
        parts = split_to_fit(chain, inputs, targets, memory_budget, rows, down_to=self.down_to, beside=beside)
        for part, some in parts:
            yield Point(self, part, some, loss or cross_entropy)


def _refuse_without_gradient(inputs: Inputs) -> None:
    """Refuse inputs that are no floating numbers, or that are not each example's own."""
    _, tensors = Signature.of(*arguments_of(inputs))
    for tensor in tensors:
        why = "" if tensor.is_floating_point() else f"inputs of {tensor.dtype} have no gradient"
        if not tensor.dim() or len(tensor) != num_examples(inputs):
            why = why or "an input that all examples share has no gradient of its own for each of them"
        if why:
            may_be_labels = len(tensors) > 1 and tensor.dim() == 1
            raise ResnetPathsError(
                "with_respect_to",
                "'input'",
                f"another place: {why}",
                "Take with_respect_to='stem', which is the output of the embedding."
                + (f" {LABELS_ARE_APART}" if may_be_labels else ""),
            )


class Point(ForwardPass):
    """Some examples at a place: their states between blocks, and what can be pulled back to it."""

    def __init__(self, place: Place, inputs: Inputs, targets: object, loss: Loss) -> None:
        super().__init__(place.chain, inputs, down_to=place.down_to, of_input=place.of_input)
        self.place = place
        self.cotangents = head_cotangents(
            place.chain, self.states[-1], self.context, lambda logits: checked_losses(loss, logits, targets)
        )

    def by_length(
        self, longest: int, num_draws: int = 1, draw_signs: Callable[[], torch.Tensor] | None = None
    ) -> Stack:
        """Gradients at the place, one row per path length, up to `longest`."""
        rules = Rules(longest=longest, draw_signs=draw_signs)
        start = Cotangents.of(*self.cotangents, num_draws=num_draws)
        return self._at_place(self._through_blocks(start, rules))

    @cached_property
    def whole(self) -> Stack:
        """The whole gradient at the place, in one row."""
        return self._at_place(self._through_blocks(Cotangents.of(*self.cotangents), Rules(counted=False)))

    def of_paths(self, paths: Sequence[Path]) -> Stack:
        """Gradients of single paths at the place, one row per path."""
        start = Cotangents.of(*self.cotangents, num_rows=len(paths))
        chain, down_to = self.place.chain, self.place.down_to
        return self._at_place(pull_paths(chain, self.states, self.context, start, paths, down_to=down_to))

    def gains(self) -> Gains:
        """Norms of the whole gradient after skip and branches of the blocks above the place."""
        chain, down_to = self.place.chain, self.place.down_to
        return gains(chain, self.states, self.context, Stack.of(self.cotangents[0]), down_to=down_to)[0]

    def of_population(self, gains_of_blocks: Gains, longest: int, choose: Choose) -> tuple[Population, np.ndarray]:
        """A population of paths at the place, and the logarithms of the norms of their gradients, [row, batch]."""
        chain, down_to = self.place.chain, self.place.down_to
        start = Population.of(Cotangents.of(*self.cotangents))
        below = nothing_below(self.num_examples, longest)
        found = pull_population(
            chain, self.states, self.context, start, gains_of_blocks, below, choose, down_to=down_to
        )
        return found, self._at_place(found.cotangents).log_norms()[:, 0].numpy()

    def through_branches(self) -> Stack:
        """The whole gradient at the place, then its part through each block's branch, last block first."""
        chain, down_to = self.place.chain, self.place.down_to
        whole = Cotangents.of(*self.cotangents)
        return self._at_place(parts_through_blocks(chain, self.states, self.context, whole, down_to=down_to))

    def moments(self) -> np.ndarray:
        """Binomial moments of the path length as the gradient weighs it, of orders 0 to 2, float64 [order, batch]."""
        stack = self._at_place(self._through_blocks(Cotangents.of(*self.cotangents), Rules(longest=2, moments=True)))
        found = np.zeros((3, self.num_examples))
        found[: len(stack)] = self.shares(stack, stack.rows(0, 1))
        return found

    def shares_through_branches(self) -> np.ndarray:
        """The share of the whole gradient that passes through each block's branch, float64 [block, batch]."""
        found = [rows[0] for rows in self._shares_through_branches(pairs=False)]
        return np.array(found).reshape(len(found), self.num_examples)

    def shares_through_pairs(self) -> np.ndarray:
        """The share that passes through the branches of two blocks, or of one, float64 [block, block, batch]."""
        of_blocks = list(self._shares_through_branches(pairs=True))
        found = np.zeros((len(of_blocks), len(of_blocks), self.num_examples))
        for index, (own, *before) in enumerate(of_blocks):
            found[index, index] = own
            for earlier, share in enumerate(before):
                found[index, earlier] = found[earlier, index] = share
        return found

    def _shares_through_branches(self, *, pairs: bool) -> Iterator[np.ndarray]:
        place, whole = self.place, Cotangents.of(*self.cotangents)
        above: list[Cotangents] = []
        for index in reversed(range(place.down_to, len(place.chain))):
            above.insert(0, whole)
            whole = pull_back(
                place.chain, self.states, self.context, whole, Rules(counted=False), down_to=index, up_from=index + 1
            )
        direction = self._direction()
        squares = wide(self.whole.values[0, 0]).reshape(self.num_examples, -1).square().sum(1)
        products = products_through_branches(
            place.chain, self.states, self.context, above, direction, pairs=pairs, down_to=place.down_to
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            for product, exponents in products:
                powers = exponents - self.whole.exponents[0, 0]
                yield np.ldexp((product / squares).cpu().numpy(), powers.cpu().numpy())

    @torch.no_grad()
    def _direction(self) -> Tangents:
        """The whole gradient as a direction at the first block above the place, without its power of 2."""
        place, values = self.place, self.whole.values[0]
        exponents = torch.zeros_like(self.whole.exponents[0])
        names = self.context.carrying
        if place.of_input:
            signature, tensors = Signature.of(*arguments_of(self.inputs))
            pieces = _apart(values, tensors)
            with DIFFERENTIABLE_PULLBACKS:
                outputs, pull = linearize_all(self._beginning(signature), tensors)
            state, *context = pushed_all(pull, outputs, pieces)
        else:
            beside = [name for name in names if name not in self.first_states]
            state, *others = _apart(values, [self.states[place.down_to], *(self.context.values[n] for n in beside)])
            by_name = dict.fromkeys(self.first_states, state) | dict(zip(beside, others, strict=True))
            context = [by_name[name] for name in names]
        return Tangents(state, dict(zip(names, context, strict=True)), exponents)

    def by_depth(self) -> Iterator[Stack]:
        """The whole gradient at the last block's output, then at each block's input, last block first."""
        place, found = self.place, Cotangents.of(*self.cotangents)
        for index in reversed(range(place.down_to, len(place.chain))):
            yield found.state
            found = pull_back(
                place.chain, self.states, self.context, found, Rules(counted=False), down_to=index, up_from=index + 1
            )
        yield self._at_place(found)

    def by_stage_lengths(self, stages: Sequence[range], memory_budget: int) -> Iterator[tuple[tuple[int, ...], Stack]]:
        """Gradients at the place by the length of the path in each stage, one by one; stages first to last."""
        yield from self._down_stages(list(stages), Cotangents.of(*self.cotangents), [()], memory_budget)

    def _down_stages(
        self, stages: list[range], above: Cotangents, lengths: list[tuple[int, ...]], memory_budget: int
    ) -> Iterator[tuple[tuple[int, ...], Stack]]:
        if not stages:
            arrived = self._at_place(above)
            for draw, key in enumerate(lengths):
                some = slice(draw, draw + 1)
                yield key, Stack(arrived.values[:, some], arrived.exponents[:, some])
            return
        *earlier, stage = stages
        # Paths that differ in later stages do not meet again: some at a time, to stay within the memory.
        widest = max(self.states[i].numel() * self.states[i].element_size() for i in stage)
        at_once = max(memory_budget // (STACKS_AT_ONCE * (len(stage) + 1) * widest), 1)
        for start in range(0, len(lengths), at_once):
            some = slice(start, start + at_once)
            group = above.mapped(lambda s: Stack(s.values[:, some], s.exponents[:, some], s.shortest))  # noqa: B023
            pulled = pull_back(
                self.place.chain,
                self.states,
                self.context,
                group,
                Rules(),
                down_to=stage.start,
                up_from=stage.stop,
            )
            state, *others = aligned([pulled.state, *pulled.context.values()])
            keys = [(state.shortest + k, *key) for k in range(len(state)) for key in lengths[some]]
            pulled = Cotangents(state, dict(zip(pulled.context, others, strict=True)))
            flat = pulled.mapped(lambda s: Stack(s.values.flatten(0, 1)[None], s.exponents.flatten(0, 1)[None]))
            yield from self._down_stages(earlier, flat, keys, memory_budget)

    def _through_blocks(self, start: Cotangents, rules: Rules) -> Cotangents:
        return pull_back(self.place.chain, self.states, self.context, start, rules, down_to=self.place.down_to)

    @torch.no_grad()
    def _at_place(self, found: Cotangents) -> Stack:
        place = self.place
        if place.of_parameters:
            block = place.down_to - 1
            return parameter_cotangents(place.chain[block], self.states[block], self._context_of, found.state)
        state, *context = aligned([found.state, *found.context.values()])
        if place.of_input:
            return self._through_stem([state, *context]).renormalised()
        beside = []
        for name, stack in zip(found.context, context, strict=True):
            if name in self.first_states:
                state = replace(state, values=state.values + stack.values)
            else:
                beside.append(stack)
        return _side_by_side([state, *beside]) if context else state

    def _context_of(self, example: int) -> Mapping[str, torch.Tensor]:
        """The context of one example alone."""
        alone = next(itertools.islice(split(self.inputs, None, 1), example, None))[0]
        args, kwargs = arguments_of(each_tensor(torch.clone, alone))
        return self.place.chain.begin(*args, **kwargs)[1]

    def _through_stem(self, stacks: Sequence[Stack]) -> Stack:
        """Cotangents of all that the stem returns at the inputs, those of several inputs side by side."""
        chain = self.place.chain
        signature, tensors = Signature.of(*arguments_of(self.inputs))
        if signature.is_plain and len(tensors) == 1 and not chain.context_names:
            return stacks[0].pulled(linearize(chain.stem, tensors[0])[1])[0]
        _, pull = linearize_all(self._beginning(signature), tensors)
        first = stacks[0]
        leading = first.exponents.shape[:2]
        pieces = pull([stack.values.flatten(0, 1) for stack in stacks])
        return _side_by_side([replace(first, values=v.reshape(*leading, *v.shape[1:])) for v in pieces])

    def _beginning(self, signature: Signature) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The first state, and the context that carries a gradient, as a function of the tensors of the inputs."""

        def beginning(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = signature.arguments(given)
            state, context = self.place.chain.begin(*args, **kwargs)
            return (state, *(context[name] for name in self.context.carrying))

        return beginning

    @torch.no_grad()
    def norms(self, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
        """Euclidean norms of a stack's rows, float64 [length, draw, batch], and where they are not 0 but stand so."""
        squares = wide(torch.zeros_like(stack.exponents))
        for k, row in enumerate(stack.values):  # row by row: a float64 copy of all would be twice the stack
            squares[k] = wide(row.flatten(2)).square().sum(2) if row.dim() > 2 else wide(row).square()
        mantissas = squares.sqrt().cpu().numpy()
        with np.errstate(over="ignore"):
            norms = np.ldexp(mantissas, stack.exponents.cpu().numpy())
        return norms, (mantissas > 0) & (norms == 0)

    @torch.no_grad()
    def shares(self, stack: Stack, whole: Stack) -> np.ndarray:
        """<row, G> / <G, G> for the whole gradient G, of the first draw; float64 [length, batch], NaN where G is 0."""
        dots = wide(torch.zeros_like(stack.exponents[:, 0]))
        direction = wide(whole.values[0, 0]).reshape(self.num_examples, -1)
        squares = direction.square().sum(1)
        for k, row in enumerate(stack.values[:, 0]):
            dots[k] = (wide(row.reshape(self.num_examples, -1)) * direction).sum(1)
        powers = (stack.exponents[:, 0] - whole.exponents[0, 0]).cpu().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: np.ndarray = np.ldexp((dots / squares).cpu().numpy(), powers)
        return shares


def _apart(values: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Rows of several tensors that were put side by side, [1, batch, ...]."""
    pieces = torch.split(values.flatten(2), [tensor[0].numel() for tensor in like], 2) if len(like) > 1 else [values]
    return [piece.reshape(1, *tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _side_by_side(stacks: Sequence[Stack]) -> Stack:
    """Cotangents of several tensors, with exponents in common, as those of one that holds them all."""
    if len(stacks) == 1:
        return stacks[0]
    # One number of each example, such as the time of a diffusion model, has no dimension to flatten.
    return replace(stacks[0], values=torch.cat([stack.values.unsqueeze(-1).flatten(3) for stack in stacks], 3))


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

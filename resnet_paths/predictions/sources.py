"""The output of some examples as a sum over sources and path lengths.

At a fixed forward pass every part of a chain is an affine map, ``J x + c`` with ``c = f(x) - J x``: the output is a sum
over sources (what the stem returns, and the constants of all parts) and over the paths from each source to the output.
The cotangent of a constant is known from the backward pass: ``<v, output of the part> - <J^T v, its input>``. It is
carried as one more entry of the context, at the length of v: one more for a part inside a branch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from resnet_paths._utils.devices import wide
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.backward.cotangents import Cotangents, Stack
from resnet_paths.core.backward.forward import ForwardPass, prepared, split_to_fit
from resnet_paths.core.backward.linearize import Context, Pullback, finite, inner_products, with_constant
from resnet_paths.core.backward.recursion import Linearizer, Rules, pull_back
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import Inputs, InputsOrLoader, batches_with_bar
from resnet_paths.core.parts import call_part
from resnet_paths.predictions.outputs import Output, output_function

__all__ = ["PARTS", "Source", "all_contributions", "at_head", "contributions", "sources_of"]

PARTS = ("pre", "skip", "branch", "post")
"""Parts of a block that may have a constant."""


@dataclass(frozen=True)
class Source:
    """Where paths begin.

    Attributes:
        name: ``"stem"``, the name of a block, or ``"head"``.
        block_index: Position of the block; None of stem and head.
        part: ``"pre"``, ``"skip"``, ``"branch"`` or ``"post"``; None of a whole block, of stem and head; ``"all"`` of
            all blocks together.
    """

    name: str
    block_index: int | None = None
    part: str | None = None

    @property
    def is_of_blocks(self) -> bool:
        """Whether it is a part, a block or all of them."""
        return self.block_index is not None or self.part is not None

    def num_blocks_before(self, num_blocks: int) -> int:
        """How many of the blocks of a chain: none before the stem, all before the head.

        Args:
            num_blocks: Number of the chain's blocks.

        Returns:
            Number of blocks.
        """
        if self.block_index is not None:
            return self.block_index
        return 0 if self.name == "stem" else num_blocks

    @property
    def key(self) -> str:
        """The name of its entry in the context; no such entry of a chain's own has a space in it."""
        return f"constant {self.block_index} {self.part}"


def sources_of(chain: ResidualChain, by_source: bool | str = True) -> list[Source]:
    """All sources of a chain.

    Args:
        chain: The chain.
        by_source: Whether each block is a source of its own, or all blocks are one; ``"parts"`` for the parts of each.

    Returns:
        The stem, the blocks from first to last, the head.
    """
    if not by_source:
        return [Source("stem"), Source("blocks", part="all"), Source("head")]
    parts = PARTS if by_source == "parts" else (None,)
    blocks = [Source(block.name, index, part) for index, block in enumerate(chain) for part in parts]
    return [Source("stem"), *blocks, Source("head")]


def all_contributions(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: torch.Tensor | None,
    output: Output,
    sources: Sequence[Source],
    num_lengths: int,
    linearizer: Linearizer,
    memory_budget: int,
    progress: bool,
    *,
    moments: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """What `contributions` returns, for all batches.

    Args:
        chain: The chain.
        inputs: A batch or a loader.
        targets: Class indices, or None.
        output: The number that is split.
        sources: From `sources_of`.
        num_lengths: Number of lengths of interest, from 0.
        linearizer: What linearizes a part.
        memory_budget: Bytes that stacks of cotangents and kept activations may take.
        progress: Whether to show a bar over the batches of a loader.
        moments: As for `contributions`.

    Returns:
        Outputs [example], and contributions [source, length, example], float64.

    Raises:
        ResnetPathsError: If the output is not one finite number per example.
    """
    found = []
    for batch, labels in batches_with_bar("prediction", inputs, targets, progress):
        for part, some in split_to_fit(chain, *prepared(chain, batch, labels), memory_budget, num_lengths):
            output_of = output_function(output, some)
            found.append(contributions(chain, part, output_of, sources, num_lengths, linearizer, moments=moments))
    return np.concatenate([one for one, _ in found]), np.concatenate([all_ for _, all_ in found], 2)


@torch.no_grad()
def contributions(
    chain: ResidualChain,
    inputs: Inputs,
    output_of: Callable[[torch.Tensor], torch.Tensor],
    sources: Sequence[Source],
    num_lengths: int,
    linearizer: Linearizer,
    *,
    moments: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The output of each example, and what each source contributes to it along the paths of each length.

    Args:
        chain: The chain.
        inputs: Examples that fit into memory.
        output_of: From what the chain returns to one number per example.
        sources: From `sources_of`.
        num_lengths: Number of lengths of interest, from 0.
        linearizer: What linearizes a part.
        moments: Whether the second dimension is the order j of binomial moments in place of the length: the sum over
            lengths k of C(k, j) times the contribution.

    Returns:
        Outputs [batch], and contributions [source, length, batch], float64.

    Raises:
        ResnetPathsError: If `output_of` does not return one finite number per example.
    """
    point = ForwardPass(chain, inputs)
    blocks = {(s.block_index, s.part): s.key for s in sources if s.is_of_blocks}

    def of_part(index: int, part: str) -> Linearizer:
        key = next(blocks[place] for place in ((index, part), (index, None), (None, "all")) if place in blocks)
        return functools.partial(_with_constant, linearizer, key)

    outputs, constant, above = _above_blocks(chain, point, output_of, linearizer)
    none = Stack.of(torch.zeros_like(constant)).rows(0, 0)
    above = Cotangents(above.state, {**above.context, **dict.fromkeys(blocks.values(), none)})
    constants = tuple(blocks.values())
    rules = Rules(longest=num_lengths - 1, constants=constants, moments=moments, linearizer=of_part)
    found = pull_back(chain, point.states, point.context, above, rules)
    values = np.zeros((len(sources), num_lengths, point.num_examples))
    for row, source in zip(values, sources, strict=True):
        if source.is_of_blocks:
            _add(row, found.context[source.key], None)
        elif source.name == "head":
            row[0] = constant.cpu().numpy()
    _add(values[0], found.state, point.states[0])
    for name in point.context.carrying:
        _add(values[0], found.context[name], finite(point.context.values[name]))
    return outputs, values


def _with_constant(
    linearizer: Linearizer, key: str, module: torch.nn.Module, state: torch.Tensor, context: Context
) -> tuple[torch.Tensor, Pullback]:
    output, pullback = linearizer(module, state, context)
    return output, with_constant(pullback, key, output, state, context)


def _above_blocks(
    chain: ResidualChain,
    point: ForwardPass,
    output_of: Callable[[torch.Tensor], torch.Tensor],
    linearizer: Linearizer,
) -> tuple[np.ndarray, torch.Tensor, Cotangents]:
    """Outputs; the constant of the head, with that of the output's own function; the cotangents after all blocks."""
    context = point.context
    outputs, constant, of_state, read = at_head(chain, point.states[-1], context, output_of, linearizer)
    of_context = {n: read[n] if n in read else torch.zeros_like(context.values[n]) for n in context.carrying}
    return outputs.cpu().numpy(), constant, Cotangents.of(of_state, of_context)


def at_head(
    chain: ResidualChain,
    state: torch.Tensor,
    context: Context,
    output_of: Callable[[torch.Tensor], torch.Tensor],
    linearizer: Linearizer,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The output of each example as an affine map of the last state.

    Args:
        chain: The chain; only its head is run.
        state: Output of the last block.
        context: The context.
        output_of: From what the chain returns to one number per example.
        linearizer: What linearizes the head.

    Returns:
        Outputs and constants [batch], float64; the cotangent of the state, and those of the context that carries a
        gradient, by name.

    Raises:
        ResnetPathsError: If `output_of` does not return one finite number per example.
    """
    direct = wide(_checked(output_of(call_part(chain.head, state.clone(), context.values)), len(state)))
    logits, pullback = linearizer(chain.head, state, context)
    leaf = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = output_of(leaf)
        slope = torch.autograd.grad(output.sum(), leaf)[0] if output.requires_grad else torch.zeros_like(leaf)
    pieces = pullback.of_all(slope[None])
    constant = direct
    for piece, value in zip(pieces, [state, *(finite(context.values[n]) for n in pullback.context)], strict=True):
        constant = constant - inner_products(piece, value)[0]
    of_state, *of_context = (piece[0] for piece in pieces)
    return direct, constant, of_state, dict(zip(pullback.context, of_context, strict=True))


def _checked(output: object, size: int) -> torch.Tensor:
    if not isinstance(output, torch.Tensor) or output.shape != (size,):
        found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ResnetPathsError("output", found, f"one number per example, a tensor of shape [{size}]")
    if not bool(torch.isfinite(output).all()):
        raise ResnetPathsError("output", "NaN or infinity", "a finite number for every example")
    return output.detach()


def _add(row: np.ndarray, stack: Stack, values: torch.Tensor | None) -> None:
    """Add what a stack contributes, times the values at which its paths begin, to [length, batch]."""
    if not len(stack):
        return
    mantissas = stack.values[:, 0] if values is None else inner_products(stack.values[:, 0], values)
    numbers = np.ldexp(wide(mantissas).cpu().numpy(), stack.exponents[:, 0].cpu().numpy())
    row[stack.shortest : stack.shortest + len(stack)] += numbers

"""Coherence of the paths of each length compared with that of a null model.

The squared coherence of the paths of length k is 1 + sum over pairs of different paths <g_S, g_T> / sum over S |g_S|^2.
A null model keeps the network but removes one thing that the paths of an example have in common. The fraction of the
second term that remains is ``kept_share``.

- *Jacobians of other examples*: each block is linearized at the state of a different example, so that no two blocks
  agree because they read the same image. What is left belongs to the network rather than to the example.
- *Random signs*: every branch gets a factor of +1 or -1. Norms of paths stay as they are, and so does the alignment of
  what branches write and read up to sign; the expectation of |G_k|^2 is the sum of |g_S|^2 (Parseval's identity), so
  that the root mean square of the coherence is 1 for any network. Only the spread between draws is informative.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from resnet_paths._utils.arguments import require_int
from resnet_paths._utils.errors import ResnetPathsError
from resnet_paths.core.backward.forward import forward, prepared, split_to_fit
from resnet_paths.core.chain import ResidualChain
from resnet_paths.core.inputs import Inputs, InputsOrLoader, batches_of, batches_with_bar, is_one_batch
from resnet_paths.core.paths import lengths_up_to, path_polynomial
from resnet_paths.gradients.estimates import SIGNS_AT_ONCE, Draws, Points, measure_exactly, rows_at_once
from resnet_paths.gradients.losses import Loss
from resnet_paths.gradients.measurements import Measurements
from resnet_paths.gradients.points import Place, Point
from resnet_paths.gradients.populations import measure_populations

__all__ = ["drawn_examples", "null_coherence"]


@torch.inference_mode(False)
def null_coherence(
    chain: ResidualChain,
    inputs: InputsOrLoader,
    targets: object = None,
    *,
    others: Inputs | None = None,
    num_repeats: int = 20,
    max_length: int | None = None,
    loss: Loss | None = None,
    with_respect_to: str | int = "input",
    num_draws: int | None = None,
    relative_error: float = 0.1,
    generator: torch.Generator | None = None,
    memory_budget: int = 2**31,
    progress: bool = True,
) -> pd.DataFrame:
    """Coherence of the paths of each length, and the part of it that remains under a null model.

    Coherence is the root of ``mean |G_k|^2 / mean sum over S of |g_S|^2``, with the gradients g_S of the paths of
    length k and their sum G_k, as in `resnet_paths.gradient_by_path_length`; both means are over examples. In the null
    model with `others`, the Jacobians of skip, branch and what follows the addition of block i are those at the state
    of an example j(i) of `others`, drawn for each example, block and repetition; blocks of one example take different
    ones as long as there are enough. Those of stem and head stay. Without `others`, each branch has a random factor of
    +1 or -1. What is left of the coherence belongs to the network rather than to the example, as the alignment of
    singular vectors across blocks does in part (Li and Papyan 2023, residual alignment).

    A repetition costs what ``method="energy"`` does with `others`, and n (n + 1) / 2 block VJPs with signs.

    Args:
        chain: The chain, in eval mode.
        inputs: A batch or a loader, as for `resnet_paths.gradient_by_path_length`.
        targets: What `loss` takes in addition to the logits.
        others: Examples, as the chain is called, at whose states blocks are linearized. They should differ from
            `inputs` and outnumber the blocks. None for random signs.
        num_repeats: Number of draws of the null model, at least 2.
        max_length: The longest paths of interest; all if None.
        loss: From (logits, targets) to a loss for each example; cross-entropy if None.
        with_respect_to: ``"input"``, ``"stem"``, or a block, for its output.
        num_draws: Paths in a population, from which the energy is estimated; None for as many as `relative_error`
            requires.
        relative_error: Relative standard error of the energy of a batch at which to stop, between 0 and 1.
        generator: Source of examples, signs and paths; seed 0 if None.
        memory_budget: Bytes that stacks of cotangents may take; the states of `others` are kept in addition.
        progress: Whether to show a bar over the batches of a loader.

    Returns:
        One row per path length: ``path_length``; ``num_paths``, exact; ``coherence`` with ``coherence_se``, due to the
        draws of paths; ``null_coherence`` over all repetitions, with ``null_coherence_se`` over repetitions, and
        ``null_coherence_low`` and ``null_coherence_high``, between which 95 % of the repetitions lie (with signs a few
        draws dominate the mean square; use 100 repetitions or more); ``kept_share``,
        ``(null_coherence^2 - 1) / (coherence^2 - 1)``, with ``kept_share_se``, both to first order; NaN where there is
        one path, and not meaningful where coherence is 1 within its error.

    Raises:
        ResnetPathsError: As `resnet_paths.gradient_by_path_length`; if blocks read context in addition to the state,
            which belongs to one example, or states of `others` have another shape than those of `inputs`.

    Example:
        >>> from resnet_paths.core.chain import Block
        >>> layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(4)]
        >>> for layer in layers:
        ...     _ = torch.nn.init.constant_(layer.weight, 0.1)
        >>> blocks = [Block(layer, torch.nn.Identity(), name=f"block{i}") for i, layer in enumerate(layers)]
        >>> chain = ResidualChain(torch.nn.Identity(), blocks, torch.nn.Identity())
        >>> frame = null_coherence(chain, torch.ones(2, 3), others=torch.rand(5, 3), loss=lambda y, _: y.sum(1))
        >>> frame.coherence.round(3).tolist()  # equal gradients: the root of the number of paths
        [1.0, 2.0, 2.449, 2.0, 1.0]
        >>> frame.kept_share.round(3).tolist()[1:-1]  # linear blocks are the same for all examples
        [1.0, 1.0, 1.0]
    """
    place = Place.of_states(chain, with_respect_to)
    memory_budget = require_int("memory_budget", memory_budget, 1)
    num_repeats = require_int("num_repeats", num_repeats, 2)
    polynomial = path_polynomial(place.above)
    counts = {k: polynomial[k] for k in lengths_up_to(polynomial, max_length)}
    draws = Draws.of(num_draws, relative_error, generator)
    beside = None if others is None else _checked_others(chain, others)
    pool: list[torch.Tensor] = []
    own: list[Measurements] = []
    null: list[list[Measurements]] = [[] for _ in range(num_repeats)]
    for batch_inputs, batch_targets in batches_with_bar("null of coherence", inputs, targets, progress):

        def points(rows: int, batch: Inputs = batch_inputs, truth: object = batch_targets) -> Iterator[Point]:
            return place.points(batch, truth, loss, memory_budget, rows)

        own.append(_measured(place, points, counts, draws))
        if beside is not None and not pool:  # not before inputs and loss are known to be right
            pool = _states_of(chain, beside, memory_budget)
        if beside is None:
            found = _with_signs(points, own[-1], counts, num_repeats, draws.generator)
        else:
            found = [
                _measured(place, _at_others(points, place, pool, own[-1], draws.generator), counts, draws) for _ in null
            ]
        for repeat, one in zip(null, found, strict=True):
            repeat.append(one)
    return _frame(counts, Measurements.joined(own), [Measurements.joined(repeat) for repeat in null])


def drawn_examples(num_blocks: int, num_examples: int, num_others: int, generator: torch.Generator) -> torch.Tensor:
    """At which of the other examples each block of each example is linearized.

    Args:
        num_blocks: Number of blocks.
        num_examples: Number of examples.
        num_others: Number of other examples.
        generator: Source of the random numbers.

    Returns:
        Indices of the others, int64 [block, example]. Those of an example are random orders of all others, one after
        another: all are different where there are no more blocks than others.
    """
    orders = [
        torch.rand(num_others, num_examples, generator=generator, device=generator.device).argsort(0)
        for _ in range(-(-num_blocks // num_others))
    ]
    return torch.cat([*orders, torch.zeros(0, num_examples, dtype=torch.int64, device=generator.device)])[:num_blocks]


def _checked_others(chain: ResidualChain, others: Inputs) -> Inputs:
    """The other examples as the chain takes them."""
    if chain.context_names:
        raise ResnetPathsError(
            "chain",
            f"blocks that read {', '.join(map(repr, chain.context_names))} beside the state",
            "a chain whose blocks read the state alone",
            "Take others=None, for random signs.",
        )
    try:
        if not is_one_batch(others):
            raise ResnetPathsError("inputs", type(others).__name__, "the inputs of one batch, or None")
        ((inputs, _),) = batches_of(others)
        return prepared(chain, inputs, None)[0]
    except ResnetPathsError as error:  # the checks of inputs, under the name that they have here
        raise ResnetPathsError("others", error.value, error.allowed, error.advice) from error


def _states_of(chain: ResidualChain, others: Inputs, memory_budget: int) -> list[torch.Tensor]:
    """The states between blocks of the other examples."""
    parts = [forward(chain, part)[0] for part, _ in split_to_fit(chain, others, None, memory_budget, 1)]
    return [torch.cat(states) for states in zip(*parts, strict=True)]


def _at_others(
    points: Points, place: Place, pool: list[torch.Tensor], own: Measurements, generator: torch.Generator
) -> Points:
    """The same examples, with the blocks above the place linearized at states of others."""
    above = range(place.down_to, len(place.chain))
    chosen = drawn_examples(len(above), own.num_examples, len(pool[0]), generator).to(pool[0].device)

    def mixed(rows: int) -> Iterator[Point]:
        first = 0
        for point in points(rows):
            some = slice(first, first + point.num_examples)
            for index, sources in zip(above, chosen[:, some], strict=True):
                state = pool[index][sources]
                if state.shape != point.states[index].shape:
                    shapes = f"states {list(state.shape[1:])} at block {place.chain[index].name or index!r}"
                    allowed = f"examples of the size of inputs, whose states are {list(point.states[index].shape[1:])}"
                    raise ResnetPathsError("others", shapes, allowed)
                point.states[index] = state
            first = some.stop
            yield point

    return mixed


def _measured(place: Place, points: Points, counts: dict[int, int], draws: Draws) -> Measurements:
    lengths = list(counts)
    exact = Measurements.joined([measure_exactly(point, lengths) for point in points(rows_at_once(lengths, None))])
    return exact.beside(measure_populations(place, points, counts, draws))


def _with_signs(
    points: Points, own: Measurements, counts: dict[int, int], num_repeats: int, generator: torch.Generator
) -> list[Measurements]:
    """The norms of the sums with a random sign on every branch; those of single paths are what they were."""
    lengths, norms = list(counts), []
    for first in range(0, num_repeats, SIGNS_AT_ONCE):
        now, parts = min(num_repeats - first, SIGNS_AT_ONCE), []
        for point in points(now * (lengths[-1] + 1)):

            def draw_signs(now: int = now, point: Point = point) -> torch.Tensor:
                bits = torch.randint(2, (now, point.num_examples), generator=generator, device=generator.device)
                return (2 * bits - 1).to(point.device)

            stack = point.by_length(lengths[-1], now, draw_signs)
            parts.append(point.norms(stack)[0][[k - stack.shortest for k in lengths]])
        norms += list(np.concatenate(parts, 2).swapaxes(0, 1))
    return [Measurements(own.num_examples, own.underflowed, each, own.shares, own.whole).beside(own) for each in norms]


def _frame(counts: dict[int, int], own: Measurements, null: list[Measurements]) -> pd.DataFrame:
    paths = list(counts.values())
    frame = pd.DataFrame({"path_length": list(counts), "num_paths": pd.Series(paths, dtype=object)})
    columns = own.columns(paths, "mean")
    coherence, coherence_se = columns["coherence"], columns["coherence_se"]
    repeats = [repeat.columns(paths, "mean") for repeat in null]
    each, energies = (np.array([r[name] for r in repeats]) for name in ("coherence", "rms_path_gradient_norm"))
    with np.errstate(invalid="ignore", divide="ignore"):
        # In units of the largest, whose square is not lost.
        energies = (energies / energies.max(0)) ** 2
        squares = (each**2 * energies).mean(0) / energies.mean(0)
        value = np.sqrt(squares)
        residuals = (each**2 - squares) * energies
        error = residuals.std(0, ddof=1) / np.sqrt(len(null)) / (2 * value * energies.mean(0))
        several = np.array(paths, dtype=object) > 1
        excess = np.where(several.astype(bool), coherence**2 - 1, np.nan)
        kept = (squares - 1) / excess
        kept_se = 2 * np.hypot(value * error, kept * coherence * coherence_se) / np.abs(excess)
    low, high = np.quantile(each, (0.025, 0.975), axis=0)
    return frame.assign(
        coherence=coherence,
        coherence_se=coherence_se,
        null_coherence=value,
        null_coherence_se=error,
        null_coherence_low=low,
        null_coherence_high=high,
        kept_share=kept,
        kept_share_se=kept_se,
    )

"""Lesion studies: what many edited chains do to the error, on the same images, nothing computed twice.

    lesion_study      lesions (`lesion`, `plans`) -> trie (`trie`) -> one result per batch (`runner`, `schedule`)
                      -> a tidy frame (`results`)
    store=            finished batches on disk (`store`), found again by their keys (`keys`)
    executor=         batches on any `concurrent.futures.Executor`, Dask's included (`schedule`)
    pair_interactions what pairs of deletions have in common (`frames`)
    predicted_effects what cheap scores say without a lesion (`predicted`)

A chain is a sequence of steps. All lesions of a study form a trie over those sequences, and every edge of the trie is
computed once per batch: the single deletions of n blocks cost about (n + 1) / 2 forward passes, not n.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, SupportsIndex

import pandas as pd
import torch
from torch.utils import data
from tqdm.auto import tqdm

from resnet_paths._utils.errors import ResnetPathsError, StudyInterrupted
from resnet_paths._utils.fingerprint import fingerprint
from resnet_paths.core.chain import ResidualChain, require_chain, require_eval_mode
from resnet_paths.core.inputs import inputs_of, require_loader
from resnet_paths.core.placement import PRECISIONS
from resnet_paths.lesions.frames import pair_interactions
from resnet_paths.lesions.keys import computes_what_it_says, network_key
from resnet_paths.lesions.lesion import Lesion
from resnet_paths.lesions.predicted import predicted_effects, score_correlations
from resnet_paths.lesions.results import counts_of_batch, rows_of_study
from resnet_paths.lesions.runner import Runner
from resnet_paths.lesions.schedule import finished_batches
from resnet_paths.lesions.store import Store
from resnet_paths.lesions.trie import Trie

__all__ = ["lesion_study", "pair_interactions", "predicted_effects", "score_correlations"]

_DESCRIPTION = ["lesion", "kind", "blocks", "block_index", "block", "num_blocks", "factor", "kendall_tau"]


def lesion_study(
    chain: ResidualChain,
    loader: Iterable[Any],
    lesions: Sequence[Lesion | Callable[[ResidualChain], ResidualChain]],
    *,
    store: str | Path | None = None,
    executor: Executor | None = None,
    device: str | torch.device = "auto",
    precision: str | None = None,
    channels_last: bool = False,
    batch_budget: int | None = None,
    fold_batchnorm: bool = False,
    per_class: bool = False,
    reestimate_batchnorm: Iterable[Any] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What each lesion does to the error, all on the same images.

    Nothing is retrained and BatchNorm keeps the statistics of the intact network, as in the paper, unless
    `reestimate_batchnorm` is given. The chain is not changed. Without `precision`, `channels_last`, `batch_budget` and
    `fold_batchnorm` each prediction is the lesioned chain's own, bit for bit. An image whose logits are not finite
    counts as wrong.

    When it is interrupted (Ctrl-C, the stop button of a notebook) it raises `StudyInterrupted`, a `KeyboardInterrupt`
    whose ``frame`` holds the rows over the batches that were finished.

    Args:
        chain: The intact chain, in eval mode.
        loader: Batches of (inputs, labels), or mappings with a key ``"labels"``, as Hugging Face's collators give.
            Inputs are a tensor, a tuple of positional arguments or a mapping of keyword arguments, as the chain was
            unraveled with; labels are class indices [batch]. Read once. A loader that drops its last batch gets a
            warning.
        lesions: Lesions, or functions from chain to chain, of which nothing else is known.
        store: Folder of finished batches, created if missing. A study that was stopped, or that has more lesions than
            before, computes only what is missing, and ends with the same frame. The folder may hold several
            studies, also at once. The loader must give the same batches each time.
        executor: Any `concurrent.futures.Executor`, such as Dask's ``client.get_executor()``: batches are spread over
            its workers. The chain is sent to each worker once.
        device: Where to run; ``"auto"`` is where the chain is, or the accelerator if the chain is on the CPU and there
            is one. With an executor each worker chooses for itself.
        precision: ``"bfloat16"``, ``"float16"``, ``"float32"`` or ``"float64"``; None for the chain's own.
        channels_last: Whether images are stored with their channels last; many convolutions are faster so.
        batch_budget: Most examples that a step may take at a time. Batches that are larger are split; states of
            several lesions that wait for the same step are stacked up to it, which is faster where one batch leaves
            the device idle. None takes the loader's batches as they are. When memory runs out it is halved.
        fold_batchnorm: Whether BatchNorm is folded into the convolution before it, where one reads nothing but that
            convolution in a part that was exported: faster, with logits that differ by rounding.
        per_class: Whether to add ``num_examples_per_class`` and ``num_wrong_per_class``, tuples over classes.
        reestimate_batchnorm: Batches of inputs, or of (inputs, labels), to take each lesioned network's BatchNorm
            statistics from, training images as a rule; a few thousand do. All are held in memory.
        progress: Whether to show a bar over batches.

    Returns:
        One row per lesion, in the order given: ``lesion`` (name); ``kind``, such as ``"delete"``, ``blocks`` (tuple of
        positions), ``num_blocks``, ``factor`` and ``kendall_tau`` (of the order of the blocks with the intact one, 1
        where none moved), as in `Lesion`; ``block_index`` and ``block``, position and name of the first of `blocks`;
        ``seed`` (of the generator that drew the lesion, if one did). Of a function ``kind`` is empty, and ``blocks``,
        ``num_blocks`` and ``kendall_tau`` are missing values. Then ``error_rate`` in [0, 1] with its 95 % Wilson
        interval ``error_rate_low`` and ``error_rate_high``; ``error_increase`` over the intact chain with its paired
        95 % interval (same images, normal approximation) ``error_increase_low`` and ``error_increase_high``; ``loss``,
        the mean cross-entropy in nats; ``num_not_finite``, images whose logits were not; ``num_examples``;
        ``intact_error_rate``; ``batchnorm_statistics``, ``"intact"`` or ``"re-estimated"``: with
        `reestimate_batchnorm` those of the intact chain are re-estimated as well, and ``intact_error_rate`` and
        increases refer to that. No lesions give a frame without rows. The frame's ``attrs`` hold
        ``block_evaluations`` and ``block_evaluations_naive``, the number of block evaluations per batch, here and in a
        loop over lesions; ``batches_computed`` and ``batches_found``, batches that were computed, and found in the
        store; ``fold_batchnorm`` as it was given.

    Raises:
        ResnetPathsError: If the chain is in training mode; the loader is empty, shuffles although there is a store, or
            does not give such batches; labels are out of range; the store cannot be written to; the chain cannot be
            sent to the executor's workers, or one of these breaks down.
        StudyInterrupted: If it is interrupted.
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    batch_budget = _checked_settings(precision, batch_budget)
    _look_at_loader(loader, store)
    named = _named(lesions)
    statistics_batches = _inputs_of(reestimate_batchnorm)
    if fold_batchnorm and statistics_batches:
        raise ResnetPathsError(
            "fold_batchnorm", True, "False with reestimate_batchnorm", "What is folded has no statistics to estimate."
        )
    keys: list[str] = []
    undetermined: list[int] = []
    trie = Trie(_edits(chain, named, None if store is None else (keys, undetermined)))
    runner = Runner(trie, device, precision, channels_last, batch_budget, fold_batchnorm, statistics_batches)
    settings = {
        "precision": precision,
        "channels_last": channels_last,
        "fold_batchnorm": fold_batchnorm,
        "batchnorm": fingerprint(statistics_batches) if statistics_batches else "intact",
    }
    results = finished_batches(
        runner,
        loader,
        store=None if store is None else Store(store, settings),
        keys=keys,
        undetermined=undetermined,
        executor=executor,
    )
    counts: dict[int, dict[str, Any]] = {}
    found: list[bool] = []

    def frame() -> pd.DataFrame:
        # Summed in the order of the loader, whichever batch was finished first.
        made = _frame_of(chain, named, rows_of_study([counts[number] for number in sorted(counts)]))
        made["batchnorm_statistics"] = "re-estimated" if statistics_batches else "intact"
        made.attrs = {
            "block_evaluations": trie.block_evaluations,
            "block_evaluations_naive": trie.block_evaluations_naive,
            "batches_computed": found.count(False),
            "batches_found": found.count(True),
            "fold_batchnorm": fold_batchnorm,
        }
        return made

    with tqdm(total=_length_of(loader), desc="lesion study", unit="batch", disable=not progress) as bar:
        try:
            for number, labels, result, was_found in results:
                counts[number] = counts_of_batch(labels, result, per_class=per_class)
                found.append(was_found)
                bar.update()
        except KeyboardInterrupt as interrupt:
            raise StudyInterrupted(frame() if counts else None, len(counts), store) from interrupt
    if not counts:
        raise ResnetPathsError("loader", "no batches", "a loader of at least one batch")
    return frame()


def _frame_of(chain: ResidualChain, lesions: Sequence[Lesion], rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per lesion; `rows` begin with that of the intact chain."""
    described = [
        {
            "lesion": lesion.name,
            "kind": lesion.kind,
            "blocks": lesion.blocks,
            "block_index": lesion.blocks[0] if lesion.blocks else math.nan,
            "block": chain[lesion.blocks[0]].name or str(lesion.blocks[0]) if lesion.blocks else None,
            "num_blocks": math.nan if lesion.num_blocks is None else lesion.num_blocks,
            "factor": math.nan if lesion.factor is None else lesion.factor,
            "kendall_tau": lesion.kendall_tau,
        }
        for lesion in lesions
    ]
    # The intact chain's row gives the columns where there is no other.
    measured = pd.DataFrame(list(rows))[1:].reset_index(drop=True)
    made = pd.DataFrame(described, columns=_DESCRIPTION)
    # As generators count them, and exactly: beside missing values pandas would take them for floats.
    seeds = [pd.NA if lesion.seed is None else lesion.seed % 2**64 for lesion in lesions]
    made["seed"] = pd.array(seeds, dtype="UInt64")
    return pd.concat([made, measured], axis=1)


def _edits(
    chain: ResidualChain, lesions: Iterable[Lesion], keys: tuple[list[str], list[int]] | None
) -> Iterator[ResidualChain]:
    """The chain, then each lesion of it, made one at a time; `keys` takes keys, and indices of undetermined ones."""
    known: dict[int, bytes] = {}
    # The intact chain comes first: increases are taken against it on the same images.
    named = itertools.chain([("chain", chain)], ((f"lesion {one.name!r}", one.edit(chain)) for one in lesions))
    for index, (argument, edited) in enumerate(named):
        require_chain(argument, edited)
        yield edited
        if keys is not None:
            keys[0].append(network_key(edited, known))
            if not computes_what_it_says(edited):
                keys[1].append(index)


def _inputs_of(batches: Iterable[Any] | None) -> tuple[Any, ...]:
    if batches is None:
        return ()
    if not hasattr(batches, "__iter__"):
        raise ResnetPathsError(
            "reestimate_batchnorm",
            batches,
            "batches of inputs to take the statistics from, or None",
            "Pass a list of a few batches of training images.",
        )
    inputs = tuple(map(inputs_of, batches))
    if not inputs or not all(isinstance(x, torch.Tensor | tuple | dict) for x in inputs):
        raise ResnetPathsError("reestimate_batchnorm", "no tensors", "at least one batch of inputs")
    return inputs


def _length_of(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _named(lesions: Iterable[Any]) -> list[Lesion]:
    """The lesions, functions among them named after themselves."""
    if isinstance(lesions, str | Lesion) or not isinstance(lesions, Iterable):
        raise ResnetPathsError("lesions", lesions, "a list of lesions, or of functions from chain to chain")
    named = []
    for lesion in lesions:
        if not isinstance(lesion, Lesion) and not callable(lesion):
            raise ResnetPathsError(
                "lesions",
                lesion,
                "a Lesion, or a function from chain to chain",
                "Make a plan, such as single_deletions(chain), or write lambda chain: delete_block(chain, ...).",
            )
        if not isinstance(lesion, Lesion):
            lesion = Lesion("", name=getattr(lesion, "__name__", repr(lesion)), function=lesion)
        named.append(lesion)
    return named


def _look_at_loader(loader: Any, store: str | Path | None) -> None:
    require_loader(loader)
    batches = getattr(loader, "batch_sampler", None)
    batches = loader if batches is None else batches
    sampler = getattr(batches, "sampler", None)
    random = data.RandomSampler | data.SubsetRandomSampler | data.WeightedRandomSampler
    if store is not None and isinstance(sampler, random):
        raise ResnetPathsError(
            "loader",
            f"a loader with a {type(sampler).__name__} (shuffle=True)",
            "a loader that gives the same batches each time",
            "The store finds batches again by their content: pass shuffle=False.",
        )
    batch_size = getattr(batches, "batch_size", None)
    if getattr(batches, "drop_last", False) and batch_size:
        left_out: str | None = f"up to {batch_size - 1}"
        with contextlib.suppress(TypeError, AttributeError):
            num_examples = len(loader.dataset if sampler is None else sampler)
            left_out = f"{num_examples % batch_size} of {num_examples}" if num_examples % batch_size else None
        if left_out:
            warnings.warn(f"loader: drop_last=True leaves out {left_out} examples", stacklevel=3)


def _checked_settings(precision: str | None, batch_budget: SupportsIndex | None) -> int | None:
    """The batch budget as a plain int."""
    if precision is not None and precision not in PRECISIONS:
        raise ResnetPathsError("precision", precision, f"one of {', '.join(map(repr, PRECISIONS))}, or None")
    if batch_budget is not None and (
        not isinstance(batch_budget, SupportsIndex)
        or isinstance(batch_budget, bool)
        or operator.index(batch_budget) < 1
    ):
        raise ResnetPathsError("batch_budget", batch_budget, "a number of examples of at least 1, or None")
    return None if batch_budget is None else operator.index(batch_budget)

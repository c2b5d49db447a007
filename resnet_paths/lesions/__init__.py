"""Lesion studies: the error of many edited chains on the same images, with common steps computed once.

    lesion_study      lesions (`lesion`, `plans`) -> trie (`trie`) -> one result per batch (`runner`, `schedule`)
                      -> a tidy frame (`results`)
    store=            finished batches on disk (`store`), found again by their keys (`keys`)
    executor=         batches on any `concurrent.futures.Executor`, Dask's included (`schedule`)
    stop_when=        each lesion on as many examples as its interval needs (`adaptive`)
    measures=         what is measured of each example or token (`measures`), summed and estimated in one place
    pair_interactions what pairs of deletions have in common (`frames`)
    predicted_effects what cheap scores say without a lesion (`predicted`)

A chain is a sequence of steps. All lesions of a study form a trie over those sequences, and every edge of the trie is
computed once per batch: the single deletions of n blocks cost about (n + 1) / 2 forward passes, not n.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import torch
from torch.utils import data
from tqdm.auto import tqdm

from resnet_paths._utils.arguments import require_int, require_path
from resnet_paths._utils.devices import choose_device
from resnet_paths._utils.errors import ResnetPathsError, StudyInterrupted
from resnet_paths._utils.fingerprint import fingerprint
from resnet_paths.core.chain import ResidualChain, require_chain
from resnet_paths.core.inputs import Inputs, each_tensor, inputs_of, num_examples, require_loader
from resnet_paths.core.modes import require_eval_mode
from resnet_paths.core.placement import validate_precision
from resnet_paths.lesions.adaptive import Precision, levels_of_looks, narrow_lesions, rows_of_adaptive_study
from resnet_paths.lesions.frames import pair_interactions
from resnet_paths.lesions.keys import computes_what_it_says, network_key
from resnet_paths.lesions.lesion import Lesion, edits_of
from resnet_paths.lesions.measures import Measure, measure, measures_of
from resnet_paths.lesions.predicted import predicted_effects, score_correlations
from resnet_paths.lesions.results import Sums, rows_of, rows_of_study
from resnet_paths.lesions.runner import Runner
from resnet_paths.lesions.schedule import Finished, finished_batches
from resnet_paths.lesions.store import Store
from resnet_paths.lesions.trie import Trie

__all__ = ["Precision", "lesion_study", "measure", "pair_interactions", "predicted_effects", "score_correlations"]

_DESCRIPTION = ["lesion", "kind", "blocks", "block_index", "block", "num_blocks", "factor", "kendall_tau"]


def lesion_study(
    chain: ResidualChain,
    loader: Iterable[object],
    lesions: Sequence[Lesion | Callable[[ResidualChain], ResidualChain]],
    *,
    measures: Sequence[str | Measure | Callable[..., object]] = ("error_rate", "cross_entropy"),
    shift_labels: bool = False,
    store: str | Path | None = None,
    executor: Executor | None = None,
    device: str | torch.device = "auto",
    precision: str | None = None,
    channels_last: bool = False,
    batch_budget: int | None = None,
    fold_batchnorm: bool = False,
    per_class: bool = False,
    per_example: bool = False,
    adjust: str | None = None,
    reestimate_batchnorm: Iterable[object] | None = None,
    stop_when: Precision | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """The error, or another measure, after each lesion, on the same examples, with intervals.

    Nothing is retrained and BatchNorm keeps the statistics of the intact network, as in the paper, unless
    `reestimate_batchnorm` is given. The chain is not changed. Without `precision`, `channels_last`, `batch_budget` and
    `fold_batchnorm` each prediction is the lesioned chain's own, bit for bit. Examples count as wrong if a logit is
    NaN or inf, or all logits are -inf; a logit of -inf is otherwise that of a masked class.

    When it is interrupted (Ctrl-C, the stop button of a notebook) it raises `StudyInterrupted`, a `KeyboardInterrupt`
    whose ``frame`` holds the rows over the batches that were finished.

    Args:
        chain: The intact chain, in eval mode.
        loader: Batches of (inputs, labels), or mappings with a key ``"labels"``, as Hugging Face's collators give; of
            inputs alone where no measure reads labels. Inputs are a tensor, a tuple of positional arguments or a
            mapping of keyword arguments, as the chain was unraveled with. Labels are class indices [batch], [batch,
            position] for tokens or [batch, height, width] for pixels, or values of the outputs' shape. Whole labels of
            -100 do not count, nor do positions where a mapping's ``"attention_mask"`` [batch, position] is 0. Read
            once. A loader that drops its last batch gets a warning.
        lesions: Lesions, or functions from chain to chain; ``Lesion("", function=f, key="1")`` also says under which
            key a store keeps what the function does.
        measures: What is measured: names, or functions and `resnet_paths.measure` of such. ``"error_rate"``,
            ``"top_5_error"`` (or another number), ``"cross_entropy"`` in nats, ``"perplexity"``, its exponential,
            ``"margin"`` (logit of the right class less the largest other), ``"mean_iou"`` (intersection over union, the
            mean over classes) read classes; ``"mean_squared_error"`` and ``"explained_variance"`` (1 - squared error /
            variance of the labels) read values; ``"agreement"`` (predictions equal to those of the intact chain) and
            ``"kl_divergence"`` (of the distribution from the intact chain's, in nats) read no labels, but cost one more
            pass of the intact chain for each batch.
        shift_labels: Whether labels [batch, position] are the input's own tokens, so that each position predicts the
            next one.
        store: Folder of finished batches, created if missing. A study that was stopped, or that has more lesions than
            before, computes only what is missing, and ends with the same frame. The folder may hold several studies,
            also at once, and may be read-only if nothing is missing. The loader must give the same batches each time.
            Stored batches are used regardless of the device, the number of threads and `batch_budget`, which change
            results by rounding only.
        executor: Any `concurrent.futures.Executor`, such as Dask's ``client.get_executor()``: batches are distributed
            over its workers. The chain is sent to each worker once.
        device: Where to run; ``"auto"`` is where the chain is, or the accelerator if the chain is on the CPU and there
            is one. With an executor each worker chooses for itself.
        precision: ``"bfloat16"``, ``"float16"``, ``"float32"`` or ``"float64"``; None for the chain's own. A lower one
            than the chain's is refused where the model's code computes parts of it in a dtype of its choice, as
            RMSNorm and rotary embeddings do in float32: convert such a model before it is unraveled.
        channels_last: Whether images are stored with their channels last, with which many convolutions are faster.
        batch_budget: Most examples that a step may take at a time. Batches that are larger are split; states of
            several lesions that wait for the same step are stacked up to it, which is faster where one batch leaves
            the device idle. None takes the loader's batches as they are. When memory runs out it is halved.
        fold_batchnorm: Whether BatchNorm is folded into the convolution before it, where one reads nothing but that
            convolution in a part that was exported: faster, with logits that differ by rounding.
        per_class: Whether to add ``num_examples_per_class`` and ``num_wrong_per_class``, tuples over classes.
        per_example: Whether to add ``m_per_example`` and ``intact_m_per_example`` for each measure m: arrays [example]
            in the order of the loader, with the measure of each example alone, NaN where nothing counts; and
            ``m_influences`` and ``intact_m_influences``, what each example adds to ``m`` to first order, of sum 0: the
            variance of any linear combination of rows is N / (N - 1) times the sum of squares of that of their
            influences.
        adjust: ``"holm"`` or ``"fdr_bh"`` to add ``m_increase_p`` for each measure m: two-sided p-values of no increase
            (McNemar's test for rates, else the test that belongs to the interval), adjusted for the number of lesions:
            the family-wise error rate or the false discovery rate is controlled.
        reestimate_batchnorm: Batches of inputs, or of (inputs, labels), usually training images, from which the
            BatchNorm statistics of each lesioned network are estimated; a few thousand images are enough. All are held
            in memory.
        stop_when: `resnet_paths.lesions.Precision` to measure each lesion only until the interval of its increase is
            that narrow: ``Precision(0.01)``. Intervals are wider, at a level that is in the column ``interval_level``,
            so that they hold with 95 % although the number of examples depends on the results
            (`resnet_paths.lesions.adaptive`). The loader must have a length, and its examples must be in random order;
            ``num_examples`` differs from row to row, and ``intact_m`` and increases are of the same examples.
        progress: Whether to show a bar over batches, with the number of examples so far.

    Returns:
        One row per lesion, in the order given: ``lesion`` (name); ``kind``, such as ``"delete"``, ``blocks`` (tuple of
        positions), ``num_blocks``, ``factor`` and ``kendall_tau`` (of the order of the blocks with the intact one, 1
        where none moved), as in `Lesion`; ``block_index`` and ``block``, position and name of the first of `blocks`;
        ``seed`` (of the generator that drew the lesion, if one did). Of a function ``kind`` is empty, and ``blocks``,
        ``num_blocks`` and ``kendall_tau`` are missing values. Then for each measure m:
        ``m`` with its 95 % interval ``m_low`` and ``m_high``; ``m_increase`` over the intact chain with the interval of
        the paired difference ``m_increase_low`` and ``m_increase_high``; ``intact_m``. Means are over all items, such
        as tokens; the items of an example are one cluster. Rates (``error_rate``, in [0, 1], ``top_5_error``,
        ``agreement``) have Wilson's interval, and Tango's of the difference; all else has a studentised one, corrected
        for skewness, missing where all examples are equal (`resnet_paths._utils.statistics` has the coverage).
        ``num_not_finite``, examples with outputs that were not finite; ``num_examples``;
        ``batchnorm_statistics``, ``"intact"`` or ``"re-estimated"``: with
        `reestimate_batchnorm` those of the intact chain are re-estimated as well, and ``intact_m`` and
        increases refer to that. No lesions give a frame without rows. The frame's ``attrs`` hold
        ``block_evaluations`` and ``block_evaluations_naive``, the number of block evaluations per batch, here and in a
        loop over lesions; ``batches_computed`` and ``batches_found``, batches that were computed, and found in the
        store; ``fold_batchnorm`` as it was given.

    Raises:
        ResnetPathsError: If the chain is in training mode; the loader is empty, shuffles although there is a store, or
            does not give such batches; labels are out of range; the precision is refused; the store lacks results
            and cannot be written to; the chain cannot be sent to the executor's workers, or one of these breaks down.
        StudyInterrupted: If it is interrupted.
    """
    require_chain("chain", chain)
    require_eval_mode("chain", chain)
    validate_precision(precision, chain)
    batch_budget = _checked_settings(batch_budget, adjust, stop_when)
    store = None if store is None else require_path("store", store)
    _check_where(executor, device)
    _look_at_loader(loader, store)
    named, measured = _named(lesions), measures_of(measures)
    looks = {} if stop_when is None else _looks(stop_when, measured, loader)
    _refuse_what_is_not_measured(measured, per_class, store)
    statistics_batches = _inputs_of(reestimate_batchnorm, fold_batchnorm)
    keys: tuple[list[str], list[int]] | None = None if store is None else ([], [])
    trie = Trie(_edits(chain, named, keys))
    placement = (device, precision, channels_last, batch_budget, fold_batchnorm)
    runner = Runner(trie, *placement, measured, shift_labels, statistics_batches)
    wanted, stops = list(range(trie.num_chains)), dict[int, tuple[float, float]]()
    results = finished_batches(
        runner,
        loader,
        store=None if store is None else Store(store, _settings(runner)),
        keys=keys or ([], []),
        executor=executor,
        wanted=wanted,
        looks=looks,
    )
    finished: dict[int, tuple[Sums, np.ndarray | None, bool]] = {}
    frame = partial(_frame_of, chain, named, runner, finished, adjust, per_example, looks, stops)
    try:
        for number, labels, sums, was_found in _with_bar(results, _length_of(loader), progress):
            finished[number] = sums, _classes_of(labels) if per_class else None, was_found
            if stop_when is not None and _stop(stop_when, wanted, stops, finished, looks, measured):
                break
    except KeyboardInterrupt as interrupt:
        raise StudyInterrupted(frame() if finished else None, len(finished), store) from interrupt
    if not finished:
        raise ResnetPathsError("loader", "no batches", "a loader of at least one batch")
    return frame()


def _with_bar(results: Iterator[Finished], total: int | None, progress: bool) -> Iterator[Finished]:
    num_seen = 0
    with tqdm(total=total, desc="lesion study", unit="batch", disable=not progress) as bar:
        for result in results:
            num_seen += next(iter(result[2].values())).shape[1]
            bar.set_postfix_str(f"{num_seen} examples", refresh=False)
            bar.update()
            yield result


def _classes_of(labels: torch.Tensor | None) -> np.ndarray:
    if labels is None or labels.dim() != 1 or bool((labels < 0).any()):
        shown = None if labels is None else list(labels.shape)
        raise ResnetPathsError("per_class", f"True with labels {shown}", "True with one class for each example")
    return labels.cpu().numpy().copy()  # the loader may use its tensors again


def _settings(runner: Runner) -> dict[str, object]:
    """What the results in a store have in common."""
    return {
        "measures": sorted({measure.statistic for measure in runner.measures}),
        "shift_labels": runner.shift_labels,
        "precision": runner.precision,
        "channels_last": runner.channels_last,
        "fold_batchnorm": runner.fold_batchnorm,
        "batchnorm": fingerprint(runner.statistics_batches) if runner.statistics_batches else "intact",
        "autocast": [[device, str(dtype)] for device, dtype in runner.autocast],
        # Of float32: TF32 and bfloat16 products differ by more than rounding.
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
    }


def _refuse_what_is_not_measured(measures: Sequence[Measure], per_class: bool, store: object) -> None:
    names = [measure.name for measure in measures]
    if per_class and "error_rate" not in names:
        raise ResnetPathsError("per_class", True, "False without 'error_rate' among measures")
    unkeyed = [measure.name for measure in measures if measure.key is None]
    if store is not None and unkeyed:
        raise ResnetPathsError(
            "measures",
            unkeyed[0],
            "functions with a key where there is a store",
            f"The store cannot tell whether a function has changed: measure({unkeyed[0]}, key='1').",
        )


def _frame_of(
    chain: ResidualChain,
    lesions: Sequence[Lesion],
    runner: Runner,
    finished: Mapping[int, tuple[Sums, np.ndarray | None, bool]],
    adjust: str | None,
    per_example: bool,
    looks: Mapping[int, float],
    stops: Mapping[int, tuple[float, float]],
) -> pd.DataFrame:
    """One row per lesion, over the batches that are finished: sums, classes, and whether they were in the store."""
    # In the order of the loader, whichever batch was finished first.
    all_sums, classes, were_found = zip(*(finished[number] for number in sorted(finished)), strict=True)
    if looks and lesions:
        # The widest interval where the study ended between looks.
        at_end = math.inf, looks.get(len(finished), max(looks.values()))
        ends = [stops.get(index, at_end) for index in range(1, len(lesions) + 1)]
        rows = rows_of_adaptive_study(finished, runner.measures, ends, per_example=per_example)
        rows = [rows[0], *(row | {"interval_level": level} for row, (_, level) in zip(rows[1:], ends, strict=True))]
    else:
        rows = rows_of_study(
            all_sums,
            runner.measures,
            adjust=adjust,
            per_example=per_example,
            classes=None if classes[0] is None else np.concatenate(classes),
        )
    made = _described(chain, lesions, rows)
    made["batchnorm_statistics"] = "re-estimated" if runner.statistics_batches else "intact"
    made.attrs = {
        "block_evaluations": runner.trie.block_evaluations,
        "block_evaluations_naive": runner.trie.block_evaluations_naive,
        "batches_computed": len(finished) - sum(were_found),
        "batches_found": sum(were_found),
        "fold_batchnorm": runner.fold_batchnorm,
    }
    return made


def _looks(stop_when: Precision, measures: Sequence[Measure], loader: Iterable[object]) -> dict[int, float]:
    """Numbers of batches after which lesions may stop, and the level of intervals there."""
    stop_when.measure_among(measures)
    num_batches = _length_of(loader)
    if not num_batches:
        raise ResnetPathsError(
            "loader", type(loader).__name__, "batches whose number is known, with stop_when", "Pass list(loader)."
        )
    return levels_of_looks(num_batches)


def _stop(
    stop_when: Precision,
    wanted: list[int],
    stops: dict[int, tuple[float, float]],
    finished: Mapping[int, tuple[Sums, np.ndarray | None, bool]],
    looks: Mapping[int, float],
    measures: Sequence[Measure],
) -> bool:
    """At a look, take lesions whose interval is narrow enough out of `wanted`; whether no lesion is left."""
    if len(finished) not in looks:
        return False
    level = looks[len(finished)]
    ends = {index: stops[index][0] for index in stops}
    batches = []
    for number in sorted(finished):
        present = [index for index in range(len(wanted) + len(stops)) if ends.get(index, math.inf) > number]
        batches.append(rows_of(finished[number][0], [present.index(index) for index in wanted]))
    for lesion in narrow_lesions(batches, wanted[1:], stop_when, measures, level):
        wanted.remove(lesion)
        stops[lesion] = len(finished), level
    return bool(stops) and len(wanted) == 1


def _described(chain: ResidualChain, lesions: Sequence[Lesion], rows: Sequence[dict[str, object]]) -> pd.DataFrame:
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
    edits = ((f"lesion {lesion.name!r}", lesion.key, edited) for lesion, edited in edits_of(chain, lesions))
    for index, (argument, key, edited) in enumerate(itertools.chain([("chain", None, chain)], edits)):
        require_chain(argument, edited)
        yield edited
        if keys is not None:
            network = network_key(edited, known)
            keys[0].append(network if key is None else fingerprint(network, key))
            if not computes_what_it_says(edited):
                keys[1].append(index)


def _inputs_of(batches: Iterable[object] | None, fold_batchnorm: bool) -> tuple[Inputs, ...]:
    if batches is None:
        return ()
    if not hasattr(batches, "__iter__"):
        raise ResnetPathsError(
            "reestimate_batchnorm",
            batches,
            "batches of inputs to take the statistics from, or None",
            "Pass a list of a few batches of training images.",
        )
    # Copied as they come: a loader may use its tensors again.
    inputs = [each_tensor(torch.clone, inputs_of(batch)) for batch in batches]
    if not all(isinstance(x, torch.Tensor | tuple | dict) for x in inputs) or not any(map(num_examples, inputs)):
        raise ResnetPathsError("reestimate_batchnorm", "no tensors", "batches of inputs with at least one example")
    if fold_batchnorm:
        raise ResnetPathsError(
            "fold_batchnorm", True, "False with reestimate_batchnorm", "What is folded has no statistics to estimate."
        )
    return tuple(x for x in inputs if num_examples(x))


def _length_of(loader: Iterable[object]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _named(lesions: Iterable[object]) -> list[Lesion]:
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


def _check_where(executor: object, device: str | torch.device) -> None:
    if executor is None:
        choose_device(device)  # workers have their own
    elif not isinstance(executor, Executor):
        raise ResnetPathsError("executor", executor, "a concurrent.futures.Executor, or None")


def _checked_settings(
    batch_budget: SupportsIndex | None, adjust: str | None, stop_when: Precision | None
) -> int | None:
    """The batch budget as a plain int."""
    if adjust not in (None, "holm", "fdr_bh"):
        raise ResnetPathsError("adjust", adjust, "'holm', 'fdr_bh' or None")
    if stop_when is not None and (adjust is not None or not isinstance(stop_when, Precision)):
        allowed = "lesions.Precision(half_width), without adjust" if adjust else "lesions.Precision(half_width)"
        raise ResnetPathsError("stop_when", stop_when, f"{allowed}, or None")
    return None if batch_budget is None else require_int("batch_budget", batch_budget, 1)

"""What a lesion study measures: numbers of a network that are estimated from what each example adds up.

A measure reduces the outputs for a batch to a few sums for each example, such as the cross-entropy over a sequence's
tokens and how many there are; `Measure.value` makes one number of the sums over all examples. The sums of each example
are all that a study keeps, and all that its intervals are taken from.

Outputs are logits [batch, class], [batch, position, class] or [batch, class, height, width] for the measures of
classification. The large ones are read slice by slice, so that no copy of all logits is made, in float32 at least.

A new measure is an entry of ``_BUILT_IN`` at the end of this file, with a function of rows [item, class] and labels.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F

from resnet_paths._utils.devices import widest_float
from resnet_paths._utils.errors import ResnetPathsError, nearest_names

__all__ = ["IGNORED", "Measure", "measure", "measures_of", "not_finite"]

IGNORED = -100
"""Label of items that do not count, as in torch and transformers."""
_SLICE = 1 << 24  # numbers that are read at a time

_Optional: TypeAlias = torch.Tensor | None


def _mean_of_items(sums: torch.Tensor) -> torch.Tensor:
    """Of sums (over items, number of items)."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Measure:
    """One number of a network, from the sums of what its examples contribute.

    Attributes:
        name: Of its columns.
        sums: From outputs [batch, ...], labels [batch, ...] or None, outputs of the intact network or None, and which
            items count, bool [batch, ...] or None for all, to the sums of each example, [batch, sum].
        value: From sums over examples [..., sum] to the number [...]; it stays the same where all sums are multiplied
            by one factor.
        statistic: Name of the sums: measures with one name read the same.
        reads: Which labels it needs: ``"classes"``, ``"values"`` or ``""`` for none.
        reads_intact: Whether it needs the outputs of the intact network.
        is_rate: Whether it is the share of items that are counted, from their number and that of all.
        link: Monotone function of the number that is shown; the interval is taken before it.
        key: Identifies the sums in a store, in addition to their name; None if they cannot be stored.
    """

    name: str
    sums: Callable[[torch.Tensor, _Optional, _Optional, _Optional], torch.Tensor]
    _: KW_ONLY
    value: Callable[[torch.Tensor], torch.Tensor] = _mean_of_items
    statistic: str
    reads: str = ""
    reads_intact: bool = False
    is_rate: bool = False
    link: Callable[[torch.Tensor], torch.Tensor] | None = None
    key: str | None = ""


def measure(
    function: Callable[..., Any], *, name: str | None = None, key: str | None = None, is_rate: bool = False
) -> Measure:
    """A function as a measure of `resnet_paths.lesion_study`: the mean of what it returns over examples, or items.

    Args:
        function: From (outputs, labels), or from (outputs, labels, intact_outputs) where it has three parameters, to a
            tensor: one value for each example [batch], or for each item of an example [batch, ...], such as tokens or
            pixels; or to a pair of such values and their weights, 0 where a value does not count. Labels are as the
            loader gives them (shifted with ``shift_labels``), or None; items with the label -100 and padding are left
            out in any case. For an executor with other processes, it must be a function of a module, not a lambda.
        name: Of the columns; the function's own if None.
        key: Identifies the function in a store; choose another one when the function changes. Required for a study with
            a store.
        is_rate: Whether all values are 0 or 1, and weights too and the same for all lesions: then intervals are those
            of rates.

    Returns:
        The measure.

    Raises:
        ResnetPathsError: If it is not a function of two or three parameters, or has no name that can be a column.

    Example:
        >>> import torch
        >>> def brier_score(outputs, labels):
        ...     return (outputs.softmax(1) - torch.nn.functional.one_hot(labels, outputs.shape[1])).square().sum(1)
        >>> measure(brier_score, key="1").name
        'brier_score'
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no function, or one of C
        parameters = None
    required = [
        p for p in parameters or () if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if not callable(function) or (parameters is not None and len(required) not in (2, 3)):
        raise ResnetPathsError(
            "measures",
            function,
            "names, or functions of (outputs, labels) or (outputs, labels, intact_outputs)",
            f"Built in are {', '.join(map(repr, [*_BUILT_IN, 'top_5_error']))}.",
        )
    name = getattr(function, "__name__", "") if name is None else name
    if not isinstance(name, str) or not name.isidentifier():
        raise ResnetPathsError(
            "measures", name or function, "functions with a name", "Write measure(function, name='...')."
        )
    reads_intact = len(required) == 3
    sums = functools.partial(_sums_of_function, function, name, reads_intact)
    statistic = f"function {name}" + (f" {key}" if key else "")
    return Measure(name, sums, statistic=statistic, reads_intact=reads_intact, is_rate=is_rate, key=key)


def measures_of(measures: Iterable[Any]) -> tuple[Measure, ...]:
    """Measures from their names and functions.

    Args:
        measures: Names of built-in measures, functions or measures.

    Returns:
        At least one measure, each of another name.

    Raises:
        ResnetPathsError: If there is none, one is unknown, or two have one name.
    """
    given = [measures] if isinstance(measures, str | Measure) or not isinstance(measures, Iterable) else list(measures)
    found = [
        _built_in(one) if isinstance(one, str) else one if isinstance(one, Measure) else measure(one) for one in given
    ]
    names = [one.name for one in found]
    if not names or len(set(names)) < len(names):
        raise ResnetPathsError("measures", names, "at least one measure, each of another name")
    return tuple(found)


def _built_in(name: str) -> Measure:
    top = re.fullmatch(r"top_([1-9]\d*)_error", name)
    if top:
        return _of_items(name, functools.partial(_not_in_top, int(top[1])), is_rate=True)
    if name not in _BUILT_IN:
        known = [*_BUILT_IN, "top_5_error"]
        raise ResnetPathsError(
            "measures",
            name,
            f"names among {', '.join(map(repr, known))} (or another number), and functions",
            f"Similar: {nearest_names(name, known)}.",
        )
    return _BUILT_IN[name]


def not_finite(outputs: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Whether any number of an example's outputs is not finite, bool [batch, 1]; padding is omitted."""
    of_items = counts is not None and outputs.shape[: counts.dim()] == counts.shape
    shape = counts.shape if of_items and counts is not None else outputs.shape[:1]
    spoilt = torch.empty(shape, dtype=torch.bool, device=outputs.device)
    for part in _slices(outputs, min(len(shape), 2)):
        read = outputs[part]
        spoilt[part] = ~torch.isfinite(read).reshape(*read.shape[: len(shape)], -1).all(-1)
    if of_items and counts is not None:
        spoilt &= counts
    return spoilt.reshape(len(outputs), -1).any(1, keepdim=True)


def _slices(tensor: torch.Tensor, num_dims: int) -> Iterator[tuple[slice, ...]]:
    """Parts of a tensor of about `_SLICE` numbers: whole examples, or positions of one where `num_dims` is 2."""
    per_example = max(1, tensor[:1].numel())
    examples = max(1, _SLICE // per_example)
    positions = max(1, _SLICE // max(1, per_example // tensor.shape[1])) if num_dims == 2 else 0
    for start in range(0, len(tensor), examples):
        batch = slice(start, start + examples)
        if num_dims == 1:
            yield (batch,)
            continue
        for first in range(0, tensor.shape[1], positions):
            yield batch, slice(first, first + positions)


def _sums_of_values(values: torch.Tensor, weights: torch.Tensor | None, counts: torch.Tensor | None) -> torch.Tensor:
    """Sum of values and of weights over the items of each example, [batch, 2]."""
    if counts is not None and values.shape[: counts.dim()] == counts.shape:
        counts = counts.reshape(*counts.shape, *[1] * (values.dim() - counts.dim())).expand_as(values)
        weights = counts if weights is None else weights * counts
    items = values.numel() // max(1, len(values))
    if values.dtype == torch.bool or not values.is_floating_point():
        counted = values.dtype == torch.bool and (weights is None or weights.dtype == torch.bool)
        dtype = torch.uint8 if counted and items < 256 else torch.int64
    else:
        dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    if weights is None:
        sums = values.reshape(len(values), -1).sum(1, dtype=dtype)
        return torch.stack([sums, torch.full_like(sums, items)], 1)
    if weights.is_floating_point():
        dtype = torch.promote_types(torch.promote_types(dtype, torch.float32), weights.dtype)
    if values.dtype != torch.bool:  # products have room for them
        values = values.to(dtype)
    # Not a product alone: what does not count may not be finite.
    weighted = torch.where(weights != 0, values * weights, torch.zeros((), dtype=values.dtype, device=values.device))
    return torch.stack([x.reshape(len(x), -1).sum(1, dtype=dtype) for x in (weighted, weights)], 1)


def _sums_of_function(
    function: Callable[..., Any],
    name: str,
    reads_intact: bool,
    outputs: torch.Tensor,
    labels: _Optional,
    intact: _Optional,
    counts: _Optional,
) -> torch.Tensor:
    given = (outputs, labels, *([intact] if reads_intact else []))
    try:
        returned = function(*given)
    except (ResnetPathsError, torch.OutOfMemoryError):  # the latter is tried again with fewer examples
        raise
    except Exception as error:
        raise ResnetPathsError(
            "measures", name, "functions that do not raise", f"It raised {type(error).__name__}: {error}"
        ) from error
    values, weights = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    tensors = isinstance(values, torch.Tensor) and (weights is None or isinstance(weights, torch.Tensor))
    if not tensors or not values.dim() or len(values) != len(outputs):
        tensor = isinstance(values, torch.Tensor)
        shown = f"a tensor of shape {list(values.shape)}" if tensor else type(values).__name__
        raise ResnetPathsError(
            "measures",
            f"{name}, which returned {shown}",
            "values [batch] or [batch, ...], alone or with their weights",
            "Return one value for each example, not their mean: the study takes the mean.",
        )
    if weights is not None and weights.shape != values.shape:
        raise ResnetPathsError(
            "measures",
            f"{name}, whose weights are {list(weights.shape)}",
            f"weights of the values' shape, {list(values.shape)}",
        )
    return _sums_of_values(values, weights, counts)


def _each_item(
    function: Callable[..., torch.Tensor], outputs: torch.Tensor, labels: _Optional, intact: _Optional = None
) -> torch.Tensor:
    """A function of rows of logits [item, class] and labels, or the intact rows, for each item [batch, ...]."""
    dim = _class_dim(outputs, None if labels is None or labels.is_floating_point() else labels)
    logits = outputs.movedim(dim, -1)
    intact = None if intact is None else intact.movedim(dim, -1)
    values = None
    for part in _slices(logits, min(logits.dim() - 1, 2)):
        read = logits[part]
        if intact is not None:
            found = function(_rows(read), _rows(intact[part]))
        else:
            found = function(_rows(read), None if labels is None else labels[part].reshape(-1).clamp(min=0))
        found = found.reshape(read.shape[:-1])
        if values is None:
            values = found.new_empty(logits.shape[:-1])
        values[part] = found
    assert values is not None  # no batch is empty
    return values


def _rows(logits: torch.Tensor) -> torch.Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()


def _class_dim(logits: Any, labels: torch.Tensor | None) -> int:
    """As in `resnet_paths.lesions.validation`, without reading the values of the labels."""
    preferred = (2, 1) if logits.dim() == 3 else (1, logits.dim() - 1)
    if labels is None:
        return preferred[0]
    shapes = {dim: (*logits.shape[:dim], *logits.shape[dim + 1 :]) for dim in preferred}
    return next((dim for dim in preferred if shapes[dim] == labels.shape), preferred[0])


def _sums_of_items(
    function: Callable[..., torch.Tensor],
    reads: str,
    outputs: torch.Tensor,
    labels: _Optional,
    intact: _Optional,
    counts: _Optional,
) -> torch.Tensor:
    return _sums_of_values(_each_item(function, outputs, labels, None if reads else intact), None, counts)


def _has_prediction(rows: torch.Tensor) -> torch.Tensor:
    """Whether the largest logit is finite: none is NaN or inf, and not all are -inf, that of a masked class."""
    return torch.isfinite(rows.amax(1))


def _predicted(rows: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The predicted class, -1 where there is none."""
    return torch.where(_has_prediction(rows), rows.argmax(1), -1)


def _wrong(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _predicted(rows) != labels


def _not_in_top(k: int, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    right = rows.gather(1, labels[:, None])
    classes = torch.arange(rows.shape[1], device=rows.device)
    before = (rows > right) | ((rows == right) & (classes < labels[:, None]))
    return (before.sum(1) >= k) | ~_has_prediction(rows) | (right[:, 0] == -math.inf)


def _cross_entropy(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(rows, labels, reduction="none")


def _margin(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    others = rows.scatter(1, labels[:, None], -math.inf)
    return rows.gather(1, labels[:, None])[:, 0] - others.amax(1)


def _agrees(rows: torch.Tensor, intact: torch.Tensor) -> torch.Tensor:
    predicted = _predicted(rows)
    return (predicted == _predicted(intact)) & (predicted >= 0)


def _kl_divergence(rows: torch.Tensor, intact: torch.Tensor) -> torch.Tensor:
    of_intact = intact.log_softmax(1)
    share = of_intact.exp()
    # Classes of probability 0, such as those that a network masks, add nothing.
    return torch.where(share == 0, 0.0, share * (of_intact - rows.log_softmax(1))).sum(1)


def _values_and_labels(outputs: torch.Tensor, labels: _Optional) -> tuple[torch.Tensor, torch.Tensor]:
    assert labels is not None  # held by the study
    if outputs.shape == (*labels.shape, 1):
        outputs = outputs[..., 0]
    if outputs.shape != labels.shape:
        shown = list(outputs.shape)
        raise ResnetPathsError(
            "loader", f"labels {list(labels.shape)} for outputs {shown}", "labels of the outputs' shape"
        )
    return tuple(x if x.dtype == torch.float64 else x.float() for x in (outputs, labels))  # type: ignore[return-value]


def _squared_error_sums(
    outputs: torch.Tensor, labels: _Optional, _intact: _Optional, counts: _Optional
) -> torch.Tensor:
    outputs, labels = _values_and_labels(outputs, labels)
    return _sums_of_values((outputs - labels).square(), None, counts)


def _variance_sums(outputs: torch.Tensor, labels: _Optional, _intact: _Optional, counts: _Optional) -> torch.Tensor:
    """Squared errors, squared labels; labels, and their number, of each output where labels are [batch, output]."""
    outputs, labels = (x.to(widest_float(x.device)) for x in _values_and_labels(outputs, labels))
    if labels.dim() == 2 and (counts is None or counts.dim() == 1):
        each = torch.ones_like(labels) if counts is None else counts[:, None].expand_as(labels).to(labels)
        alone = torch.cat([torch.where(each > 0, labels, 0), each], 1)
    else:
        alone = _sums_of_values(labels, None, counts)
    squares = [_sums_of_values(x.square(), None, counts)[:, :1] for x in (outputs - labels, labels)]
    return torch.cat([*squares, alone], 1)


def _explained_variance(sums: torch.Tensor) -> torch.Tensor:
    of_labels, number = sums[..., 2:].chunk(2, -1)
    return 1 - sums[..., 0] / (sums[..., 1] - (of_labels.square() / number).sum(-1))


def _overlap_sums(outputs: torch.Tensor, labels: _Optional, _intact: _Optional, counts: _Optional) -> torch.Tensor:
    """Items in the intersection of prediction and label, and in their union, of each class."""
    assert labels is not None  # held by the study
    predicted = _each_item(_predicted, outputs, labels)
    num_classes = outputs.shape[_class_dim(outputs, labels)]
    known = labels != IGNORED if counts is None else counts

    def counted(classes: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        example = torch.arange(len(classes), device=classes.device).reshape(-1, *[1] * (classes.dim() - 1))
        index = (classes.clamp(min=0) + example * num_classes)[where]
        return torch.bincount(index, minlength=len(classes) * num_classes).reshape(len(classes), num_classes)

    both = counted(labels, known & (predicted == labels))
    return torch.cat([both, counted(labels, known) + counted(predicted, known & (predicted >= 0)) - both], 1)


def _mean_overlap(sums: torch.Tensor) -> torch.Tensor:
    both, either = sums.chunk(2, -1)
    seen = either > 0
    return torch.where(seen, both / either.clamp(min=1), 0.0).sum(-1) / seen.sum(-1)


def _of_items(name: str, function: Callable[..., torch.Tensor], reads: str = "classes", **options: Any) -> Measure:
    return Measure(name, functools.partial(_sums_of_items, function, reads), statistic=name, reads=reads, **options)


_BUILT_IN = {
    one.name: one
    for one in (
        _of_items("error_rate", _wrong, is_rate=True),
        _of_items("cross_entropy", _cross_entropy),
        dataclasses.replace(_of_items("cross_entropy", _cross_entropy, link=torch.exp), name="perplexity"),
        _of_items("margin", _margin),
        _of_items("agreement", _agrees, "", reads_intact=True, is_rate=True),
        _of_items("kl_divergence", _kl_divergence, "", reads_intact=True),
        Measure("mean_squared_error", _squared_error_sums, statistic="mean_squared_error", reads="values"),
        Measure(
            "explained_variance",
            _variance_sums,
            value=_explained_variance,
            statistic="explained_variance",
            reads="values",
        ),
        Measure("mean_iou", _overlap_sums, value=_mean_overlap, statistic="mean_iou", reads="classes"),
    )
}

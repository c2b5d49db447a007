"""Claims of a notebook: the assertions of its last cell, with the values that they compare.

`resnet-paths reproduce` runs `show_claims` after the last cell of each notebook, so that the executed copy contains the
values of every claim. The gallery lists them, and the tests check them again, element by element. An assertion whose
message is a list of findings (`resnet_paths.reproduce.findings`) is one claim per finding.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from resnet_paths.reproduce.findings import UNDECIDED, Finding

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["Claim", "check_claim", "claims_of", "read_claims", "show_claims"]

_MIME = "application/vnd.resnet-paths.claims+json"
_COMPARE: dict[str, Callable[[Any, Any], object]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_SIGNS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.In: "in",
    ast.NotIn: "not in",
}


class Claim(TypedDict):
    """An assertion of a notebook, with JSON types."""

    claim: str
    numbers: str
    comparisons: list[list[Any]]
    finding: NotRequired[dict[str, Any]]


def read_claims(source: str, variables: Mapping[str, object]) -> list[Claim]:
    """Read the assertions of a cell.

    Args:
        source: Source of the cell, with its assertions at the top level.
        variables: The variables of the notebook after the cell was run.

    Returns:
        One mapping per assertion, with JSON types: ``claim``, the source of the condition; ``numbers``, its message,
        which states the measured values; ``comparisons``, triples of left value, operator and right value that must all
        be true, element by element. Conditions without a comparison are compared with True. Of an assertion whose
        message is a list of findings, one mapping per finding, with its interval against the predicted range as
        ``comparisons``, and its fields as ``finding``.

    Example:
        >>> read_claims("assert 0 < x.sum() <= 9, f'sum {x.sum()}'", {"x": np.array([3, 4])})
        [{'claim': '0 < x.sum() <= 9', 'numbers': 'sum 7', 'comparisons': [[0, '<', 7], [7, '<=', 9]]}]
    """

    def value(node: ast.expr) -> object:
        return eval(compile(ast.Expression(node), "<claim>", "eval"), dict(variables))

    claims: list[Claim] = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assert):
            continue
        text, message = ast.unparse(node.test), "" if node.msg is None else value(node.msg)
        if isinstance(message, list) and message and all(isinstance(each, Finding) for each in message):
            claims += [_of_finding(text, finding) for finding in message]
            continue
        comparisons = [[_plain(left), sign, _plain(right)] for left, sign, right in _comparisons(node.test, value)]
        claims.append({"claim": text, "numbers": str(message), "comparisons": comparisons})
    return claims


def check_claim(claim: Claim) -> None:
    """Check the comparisons of a claim again, element by element.

    Args:
        claim: A claim of `read_claims` or `claims_of`.

    Raises:
        AssertionError: If a comparison is false for an element; the message lists all such elements.

    Example:
        >>> check_claim({"claim": "x < 2", "numbers": "", "comparisons": [[[1, 3, 0, 4], "<", 2]]})
        Traceback (most recent call last):
        AssertionError: x < 2: element 1: not 3 < 2; element 3: not 4 < 2
    """
    wrong = []
    for left, sign, right in claim["comparisons"]:
        if sign in {"in", "not in"}:
            wrong += [] if (left in right) == (sign == "in") else [f"not {left!r} {sign} {right!r}"]
            continue
        try:
            sides = np.broadcast_arrays(np.asarray(left, dtype=object), np.asarray(right, dtype=object))
        except ValueError:
            wrong.append(f"not {left!r} {sign} {right!r}")
            continue
        for index, one in np.ndenumerate(sides[0]):
            other = sides[1][index]
            if not _is_true(one, sign, other):
                place = f"element {', '.join(map(str, index))}: " if index else ""
                wrong.append(f"{place}not {one!r} {sign} {other!r}")
    if wrong:
        numbers = f" ({claim['numbers']})" if claim["numbers"] else ""
        raise AssertionError(f"{claim['claim']}{numbers}: {'; '.join(wrong)}")


def show_claims(source: str, variables: Mapping[str, object]) -> None:
    """Display the claims of a cell in the output of the calling cell.

    Args:
        source: Source of the cell with the assertions.
        variables: ``globals()`` of the notebook.
    """
    from IPython.display import display

    claims = read_claims(source, variables)
    text = "\n".join(f"true: {claim['claim']}: {claim['numbers']}" for claim in claims)
    display({_MIME: claims, "text/plain": text or "no claims"}, raw=True)  # type: ignore[no-untyped-call]


def claims_of(notebook: NotebookNode) -> list[Claim]:
    """Claims stored in an executed notebook.

    Args:
        notebook: A notebook executed by `resnet-paths reproduce`.

    Returns:
        See `read_claims`; empty if the notebook failed.
    """
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [claim for output in outputs for claim in output.get("data", {}).get(_MIME, [])]


def _of_finding(text: str, finding: Finding) -> Claim:
    """The claim that the interval of a finding does not exclude what was expected."""
    low, high = finding.ends
    comparisons: list[list[Any]] = []
    if finding.expected == "differs":
        comparisons = [[finding.verdict, "in", ["differs", *UNDECIDED]]]
    elif finding.expected and math.isfinite(low + high):
        if math.isfinite(finding.at_most):
            comparisons.append([low, "<=", finding.at_most])
        if math.isfinite(finding.at_least):
            comparisons.append([high, ">=", finding.at_least])
    return {"claim": text, "numbers": str(finding), "comparisons": comparisons, "finding": finding.to_dict()}


def _comparisons(test: ast.expr, value: Callable[[ast.expr], object]) -> Iterator[tuple[object, str, object]]:
    """Split a condition at ``and`` and at chained comparisons; ``(a < b).all()`` gives a < b for each element."""
    match test:
        case ast.BoolOp(op=ast.And()):
            for part in test.values:
                yield from _comparisons(part, value)
        case ast.Call(func=ast.Attribute(value=ast.Compare() as inner, attr="all"), args=[], keywords=[]):
            yield from _comparisons(inner, value)
        case ast.Compare() if all(type(sign) in _SIGNS for sign in test.ops):
            sides = [value(side) for side in (test.left, *test.comparators)]
            yield from zip(sides[:-1], [_SIGNS[type(sign)] for sign in test.ops], sides[1:], strict=True)
        case _:
            yield bool(value(test)), "==", True


def _is_true(one: object, sign: str, other: object) -> bool:
    try:
        return bool(_COMPARE[sign](one, other))
    except TypeError:  # such as a non-finite number, which is stored as a string
        return False


def _plain(value: object) -> object:
    """Convert a value to JSON types: arrays, tensors, series and tuples to lists, other objects to their repr."""
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if hasattr(value, "tolist"):  # arrays, tensors, and NumPy scalars
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset | range):
        values = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(each) for each in values]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, int | float | str | None) else repr(value)

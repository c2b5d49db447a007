"""The claims of a notebook: the assertions of its last cell, with the numbers that they compare.

`resnet-paths reproduce` runs `show_claims` behind the last cell of each notebook, so that the executed copy holds every
number that a claim is about. The gallery lists them, and the tests check them again, element by element.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["check_claim", "claims_of", "read_claims", "show_claims"]

_MIME = "application/vnd.resnet-paths.claims+json"
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
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


def read_claims(source: str, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The assertions of a cell as data.

    Args:
        source: The cell; its assertions stand at the top level.
        variables: The names that it uses, after it ran.

    Returns:
        A mapping an assertion, of what JSON can hold: ``claim``, the condition as it is written; ``numbers``, its
        message, which says what was measured; ``comparisons``, triples of left value, sign and right value that must
        all hold, element by element. Conditions that compare nothing are compared with True.

    Example:
        >>> read_claims("assert 0 < x.sum() <= 9, f'sum {x.sum()}'", {"x": np.array([3, 4])})
        [{'claim': '0 < x.sum() <= 9', 'numbers': 'sum 7', 'comparisons': [[0, '<', 7], [7, '<=', 9]]}]
    """

    def value(node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "<claim>", "eval"), dict(variables))

    return [
        {
            "claim": ast.unparse(node.test),
            "numbers": "" if node.msg is None else str(value(node.msg)),
            "comparisons": [
                [_plain(left), sign, _plain(right)] for left, sign, right in _comparisons(node.test, value)
            ],
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.Assert)
    ]


def check_claim(claim: Mapping[str, Any]) -> None:
    """Compare the numbers of a claim again, element by element.

    Args:
        claim: One of `read_claims` or `claims_of`.

    Raises:
        AssertionError: If one element of one comparison does not hold; all that do not are named with their numbers.

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
            if not _holds(one, sign, other):
                place = f"element {', '.join(map(str, index))}: " if index else ""
                wrong.append(f"{place}not {one!r} {sign} {other!r}")
    if wrong:
        numbers = f" ({claim['numbers']})" if claim["numbers"] else ""
        raise AssertionError(f"{claim['claim']}{numbers}: {'; '.join(wrong)}")


def show_claims(source: str, variables: Mapping[str, Any]) -> None:
    """Put the claims of a cell into the output of the cell that calls this.

    Args:
        source: The cell with the assertions.
        variables: The notebook's ``globals()``.
    """
    from IPython.display import display

    claims = read_claims(source, variables)
    text = "\n".join(f"holds: {claim['claim']}: {claim['numbers']}" for claim in claims)
    display({_MIME: claims, "text/plain": text or "no claims"}, raw=True)  # type: ignore[no-untyped-call]


def claims_of(notebook: Any) -> list[dict[str, Any]]:
    """The claims that an executed notebook holds.

    Args:
        notebook: A notebook that `resnet-paths reproduce` ran.

    Returns:
        As of `read_claims`; empty where the notebook did not run to its end.
    """
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [claim for output in outputs for claim in output.get("data", {}).get(_MIME, [])]


def _comparisons(test: ast.expr, value: Callable[[ast.expr], Any]) -> Iterator[tuple[Any, str, Any]]:
    """What must hold, taken apart at every ``and`` and in chains; ``(a < b).all()`` as a < b of each element."""
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


def _holds(one: Any, sign: str, other: Any) -> bool:
    try:
        return bool(_COMPARE[sign](one, other))
    except TypeError:  # such as a number that is not finite, which JSON holds as a word
        return False


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays, tensors, series and tuples as lists, other things as their repr."""
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if hasattr(value, "tolist"):  # arrays, tensors, and numpy's numbers
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset | range):
        values = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(each) for each in values]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, int | float | str | None) else repr(value)

"""Claims as data: what an assertion compares, and the same comparison made again, element by element."""

from __future__ import annotations

import json

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from resnet_paths.reproduce.claims import check_claim, claims_of, read_claims

VARIABLES = {
    "rates": pd.Series([0.1, 0.2, 0.3]),
    "frame": pd.DataFrame({"a": [1, 2], "b": [3, 4]}),
    "n": np.int64(3),
    "tensor": torch.tensor([1.5, 2.5]),
    "num_paths": 2**60,
    "names": {"b", "a"},
    "same": np.True_,
}


@pytest.mark.parametrize(
    ("condition", "comparisons"),
    [
        ("n == 3", [[3, "==", 3]]),
        ("0 <= n < 5", [[0, "<=", 3], [3, "<", 5]]),
        ("n > 1 and (n != 2 and same)", [[3, ">", 1], [3, "!=", 2], [True, "==", True]]),
        ("(rates < 0.5).all()", [[[0.1, 0.2, 0.3], "<", 0.5]]),
        ("(frame > 0).all(axis=None)", [[True, "==", True]]),
        ("rates.max() <= 0.3", [[0.3, "<=", 0.3]]),
        ("n in (2, 3)", [[3, "in", [2, 3]]]),
        ("n not in {4}", [[3, "not in", [4]]]),
        ("names == {'a', 'b'}", [[["a", "b"], "==", ["a", "b"]]]),
        ("(tensor.tolist(), num_paths) == ([1.5, 2.5], 2**60)", [[[[1.5, 2.5], 2**60], "==", [[1.5, 2.5], 2**60]]]),
        ("(frame.to_numpy() < np_limit).all()", [[[[1, 3], [2, 4]], "<", [5, 5]]]),
        ("same or n", [[True, "==", True]]),
        ("n is not None", [[True, "==", True]]),
        ("float('inf') > n", [["inf", ">", 3]]),
    ],
)
def test_an_assertion_is_what_it_compares(condition, comparisons):
    variables = VARIABLES | {"np_limit": np.array([5, 5])}
    (claim,) = read_claims(f"x = 1\nassert {condition}, f'n is {{n}}'", variables)
    assert claim == {"claim": claim["claim"], "numbers": "n is 3", "comparisons": comparisons}
    assert json.loads(json.dumps(claim)) == claim
    assert eval(claim["claim"], dict(variables))
    if "inf" not in condition:
        check_claim(claim)


@pytest.mark.parametrize(
    ("left", "sign", "right", "words"),
    [
        (3, "<", 3, "not 3 < 3"),
        ([1, 5, 2], "<=", 2, "element 1: not 5 <= 2"),
        ([[1, 2], [3, 4]], ">", [0, 3], "element 0, 1: not 2 > 3"),
        ([1, 2], "==", [1, 2, 3], r"not \[1, 2\] == \[1, 2, 3\]"),
        (False, "==", True, "not False == True"),
        (3, "in", [1, 2], r"not 3 in \[1, 2\]"),
        (1, "not in", [1, 2], r"not 1 not in \[1, 2\]"),
        ("nan", "<", 2, "not 'nan' < 2"),
        (2**60 + 1, "==", 2**60, "not 1152921504606846977 == 1152921504606846976"),
        ([[1, 2], [3]], "==", [[1, 2], [4]], r"element 1: not \[3\] == \[4\]"),
    ],
)
def test_what_does_not_hold_is_named_with_its_numbers(left, sign, right, words):
    claim = {"claim": "x", "numbers": "measured 7", "comparisons": [[left, sign, right]]}
    with pytest.raises(AssertionError, match=rf"^x \(measured 7\): {words}$"):
        check_claim(claim)


def test_assertions_without_message_and_cells_without_assertions():
    assert read_claims("x = 2", {}) == []
    assert read_claims("assert n", VARIABLES)[0]["numbers"] == ""


def test_a_notebook_that_was_not_run_holds_no_claims():
    cells = [nbformat.v4.new_code_cell("assert True"), nbformat.v4.new_markdown_cell("x")]
    assert claims_of(nbformat.v4.new_notebook(cells=cells)) == []

"""Products of powers of polynomials, against plain multiplication; deep chains take seconds."""

from __future__ import annotations

import functools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.polynomials import (
    lengths_of_product,
    multiplied,
    product_of_powers,
    shown_count,
    with_counts_as_text,
)

FACTORS = st.dictionaries(
    st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any).map(tuple), st.integers(0, 5), max_size=4
)


@given(FACTORS, st.integers(1, 2**9))
def test_powers_are_those_of_plain_multiplication(factors, others):
    listed = [factor for factor, exponent in factors.items() for _ in range(exponent)]
    # Values at a power of two larger than all coefficients hold these as digits.
    base = 1 << 400
    value = math.prod(sum(c * base**k for k, c in enumerate(factor)) for factor in listed)
    digits = []
    while value:
        value, digit = divmod(value, base)
        digits.append(digit)
    assert product_of_powers(factors) == digits
    assert functools.reduce(multiplied, listed, [1])[: len(digits)] == digits
    assert lengths_of_product(factors) == sum(1 << k for k, digit in enumerate(digits) if digit)
    both = [k for k in range(10) if others >> k & 1]
    expected = {k + j for k, digit in enumerate(digits) if digit for j in both}
    assert lengths_of_product(factors, others) == sum(1 << k for k in expected)


def test_counts_are_shown_whatever_their_size():
    assert (shown_count(0), shown_count(2**54)) == ("0", "18,014,398,509,481,984")
    for n in (100, 4_000, 14_300, 10**6):
        mantissa, power = shown_count(2**n).split("e+")
        assert float(mantissa) == pytest.approx(10 ** (n * math.log10(2) % 1), abs=0.006)
        assert int(power) == int(n * math.log10(2))


def test_counts_are_written_whatever_their_size():
    frame = rp.path_histogram(16_000).iloc[[0, 1, 8_000]].assign(name=["first", None, 3])
    written = with_counts_as_text(frame).to_csv()
    text = written.splitlines()[-1].split(",")[2]
    digits = 0
    for start in range(0, len(text), 4_000):  # by hand: Python converts no more at once
        part = text[start : start + 4_000]
        digits = digits * 10 ** len(part) + int(part)
    assert len(text) > 4_300
    assert digits == math.comb(16_000, 8_000)
    small = rp.path_histogram(200)
    assert with_counts_as_text(small).to_csv() == small.to_csv()
    assert frame.num_paths.map(type).eq(int).all()  # the frame itself stays as it is


@functools.cache
def deep(n):
    blocks = [Block(nn.Linear(1, 1), nn.Identity(), name=f"b{i}", in_shape=(1,), out_shape=(1,)) for i in range(n)]
    return ResidualChain(nn.Identity(), blocks, nn.Identity()).eval()


DEEP = {
    "histogram": lambda: rp.path_histogram(10_000),
    "first path": lambda: next(rp.enumerate_paths(10_000)),
    "first path of a length": lambda: next(rp.enumerate_paths(10_000, 5_000)),
    "samples": lambda: rp.sample_paths(10_000, 5_000, 20, torch.Generator()),
    "deletions": lambda: rp.delete_blocks(deep(1_000), range(400)),
}


@pytest.mark.parametrize("call", DEEP)
def test_deep_chains_take_seconds(call):
    deep(1_000)
    start = time.process_time()
    DEEP[call]()
    assert time.process_time() - start < 3  # 5 to 108 s one by one


def test_numbers_of_paths_of_10_000_blocks_are_exact():
    frame = rp.path_histogram(10_000)
    assert frame.num_paths[4_321] == math.comb(10_000, 4_321)
    assert frame.num_paths.sum() == 2**10_000
    assert frame.fraction.sum() == pytest.approx(1)


def test_paths_of_10_000_blocks_are_drawn_uniformly():
    paths = np.array(rp.sample_paths(10_000, 2_500, 400, torch.Generator().manual_seed(0)))
    assert set(paths.sum(1)) == {2_500}
    taken = paths.mean(0)  # binomial: 0.25 with a standard deviation of 0.0217
    assert abs(taken.mean() - 0.25) < 1e-12
    assert taken.std() == pytest.approx(np.sqrt(0.25 * 0.75 / 400), rel=0.05)
    together = (paths[:, :-1] & paths[:, 1:]).mean()
    assert together == pytest.approx(0.0625, abs=0.001)


@pytest.mark.parametrize("n", [20, 16_000, 50_000, 10**6])
def test_the_refusal_of_a_graph_can_be_printed(n):
    start = time.process_time()
    with pytest.raises(rp.ResnetPathsError, match=rf"chain: got '{n} blocks, .* paths'; .* at most 100000 nodes"):
        rp.unraveled_graph(n)
    assert time.process_time() - start < 3


def test_what_would_fill_the_memory_is_refused():
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got '1000000 blocks'; .* 8 GB\. .*scipy\.stats\.binom"):
        rp.path_histogram(10**6)


def test_a_chain_of_20_000_blocks_is_shown():
    block = deep(1)[0]
    chain = ResidualChain(nn.Identity(), [block.replace(name="") for _ in range(20_000)], nn.Identity())
    shown = [repr(chain), chain.summary()]
    assert all(text.startswith("ResidualChain of 20000 blocks, 3.98e+6020 paths") for text in shown)


MASKS = [
    torch.tensor([True, False, False, True]),
    np.array([True, False, False, True]),
    [True, False],
    [torch.tensor(True)],
    [np.True_],
]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("edit", [rp.delete_blocks, rp.permute_blocks, rp.parallel_blocks])
def test_masks_are_no_positions(edit, mask):
    with pytest.raises(rp.ResnetPathsError, match=r"block: got .*True.*; allowed: the position or the name of a block"):
        edit(deep(4), mask)


def test_tensors_of_positions_are():
    for positions in (torch.tensor([0, 3]), np.array([0, 3]), [torch.tensor(0), np.int64(3)]):
        found = rp.delete_blocks(deep(4), positions)
        assert [b.branch is None for b in found] == [True, False, False, True]


def test_names_in_a_notebook_are_text():
    name = "<img src=x onerror=alert(1)>"
    chain = ResidualChain(nn.Identity(), [deep(1)[0].replace(name=name)], nn.Identity())
    shown = chain._repr_html_()
    assert "<img" not in shown
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown

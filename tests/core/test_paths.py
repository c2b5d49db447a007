"""Counting paths, against enumeration, scipy's binomial and the constants of the paper."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import resnet_paths as rp
from resnet_paths.core import paths as paths_module
from resnet_paths.core.paths import check_path, num_paths, path_length, path_polynomial
from tests.gradients.gradient_reference import Recipe, build

CHOICES = st.lists(st.sampled_from([(False, True), (True,), (False,), (False, True, 2), (True, 2, 3)]), max_size=7)


class Chain:
    """Anything with path_choices counts as a chain here."""

    def __init__(self, choices):
        self.path_choices = tuple(choices)


def test_the_papers_constants():
    frame = rp.path_histogram(54).set_index("path_length")
    assert round(100 * frame.fraction.loc[5:17].sum(), 5) == 0.45367
    assert round(100 * frame.fraction.loc[19:35].sum(), 4) == 98.0166


@pytest.mark.parametrize("n", [0, 1, 2, 9, 54, 110])
def test_histogram_is_the_binomial(n):
    frame = rp.path_histogram(n)
    assert list(frame.columns) == ["path_length", "num_paths", "fraction"]
    assert frame.num_paths.tolist() == [math.comb(n, k) for k in range(n + 1)]
    assert all(type(count) is int for count in frame.num_paths)
    assert frame.fraction.to_numpy() == pytest.approx(stats.binom.pmf(range(n + 1), n, 0.5), rel=1e-9)


def test_a_thousand_blocks_do_not_overflow():
    frame = rp.path_histogram(1000)
    assert sum(frame.num_paths) == 2**1000
    assert frame.num_paths[500] == math.comb(1000, 500)
    # Correctly rounded: no float is nearer to the exact ratio.
    for k in (0, 3, 499, 500, 1000):
        exact = Fraction(math.comb(1000, k), 2**1000)
        found = frame.fraction[k]
        neighbours = (math.nextafter(found, 0), math.nextafter(found, 1))
        assert all(abs(Fraction(found) - exact) <= abs(Fraction(other) - exact) for other in neighbours)


@given(CHOICES)
def test_polynomial_counts_what_enumeration_lists(choices):
    chain = Chain(choices)
    listed = list(rp.enumerate_paths(chain))
    assert listed == list(itertools.product(*choices))
    by_length = Counter(sum(map(bool, path)) for path in listed)
    assert path_polynomial(chain) == [by_length[k] for k in range(max(by_length) + 1)]
    assert sum(rp.path_histogram(chain).fraction) == pytest.approx(1)
    for length in by_length:
        assert sorted(rp.enumerate_paths(chain, length)) == sorted(p for p in listed if sum(map(bool, p)) == length)


def test_numpy_integers_are_integers():
    assert rp.path_histogram(np.int64(9)).equals(rp.path_histogram(9))
    assert len(rp.sample_paths(np.int64(9), np.int64(3), 2, torch.Generator())) == 2


def test_enumeration_of_a_length_is_lazy():
    assert sum(next(rp.enumerate_paths(500, length=250))) == 250


@settings(max_examples=15, deadline=None)
@given(CHOICES.filter(lambda c: len(c) >= 2), st.data())
def test_sampling_is_uniform_over_the_paths_of_a_length(choices, data):
    chain = Chain(choices)
    lengths = [k for k, count in enumerate(path_polynomial(chain)) if count]
    length = data.draw(st.sampled_from(lengths))
    population = list(rp.enumerate_paths(chain, length))
    num_samples = 40 * len(population)
    drawn = Counter(rp.sample_paths(chain, length, num_samples, torch.Generator().manual_seed(0)))
    assert set(drawn) <= set(population)
    if len(population) > 1:
        assert stats.chisquare([drawn[path] for path in population]).pvalue > 1e-6


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second = (rp.sample_paths(54, 11, 20, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert len(set(first)) > 1
    assert torch.equal(before, torch.random.get_rng_state())


# Chains inside branches


PLAIN = st.sampled_from([(False, True), (True,), (False,), (False, True, 2)])
NESTED = st.recursive(
    PLAIN,
    lambda blocks: st.tuples(st.booleans(), st.lists(blocks, min_size=1, max_size=3)).map(
        lambda drawn: (*([False] if drawn[0] else []), tuple(drawn[1]))
    ),
    max_leaves=6,
)
CHAINS_OF_CHAINS = st.lists(NESTED, max_size=4).filter(lambda choices: len(listed(choices)) <= 2000)


def listed(choices):
    """All paths, a product at every depth."""
    return list(
        itertools.product(
            *([e for c in offered for e in (listed(c) if isinstance(c, tuple) else [c])] for offered in choices)
        )
    )


def branches_taken(path):
    return sum(1 + branches_taken(entry) if isinstance(entry, tuple) else bool(entry) for entry in path)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(CHAINS_OF_CHAINS)
def test_polynomial_and_enumeration_of_chains_inside_branches(choices):
    chain, paths = Chain(choices), listed(choices)
    assert list(rp.enumerate_paths(chain)) == paths
    assert num_paths(choices) == len(paths)
    by_length = Counter(map(branches_taken, paths))
    assert path_polynomial(chain) == [by_length[k] for k in range(max(by_length) + 1)]
    assert sum(rp.path_histogram(chain).num_paths) == len(paths)
    for length in by_length:
        assert list(rp.enumerate_paths(chain, length)) == [p for p in paths if branches_taken(p) == length]
    for path in paths:
        assert path_length(path) == branches_taken(path)
        assert check_path(choices, path) == path
    with pytest.raises(rp.ResnetPathsError, match="length: got"):
        rp.enumerate_paths(chain, max(by_length) + 1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(CHAINS_OF_CHAINS.filter(lambda choices: 1 < len(listed(choices)) <= 300), st.data())
def test_sampling_is_uniform_over_the_paths_through_chains_inside_branches(choices, data):
    chain = Chain(choices)
    length = data.draw(st.sampled_from([k for k, count in enumerate(path_polynomial(chain)) if count]))
    population = list(rp.enumerate_paths(chain, length))
    drawn = Counter(rp.sample_paths(chain, length, 40 * len(population), torch.Generator().manual_seed(0)))
    assert set(drawn) <= set(population)
    if len(population) > 1:
        assert stats.chisquare([drawn[path] for path in population]).pvalue > 1e-6


def test_counting_and_sampling_through_deep_chains_inside_branches():
    inner = ((False, True),) * 60
    chain = Chain([(False, inner)] * 5)
    counts = path_polynomial(chain)
    assert sum(counts) == (2**60 + 1) ** 5 == num_paths(chain.path_choices)
    assert counts[:3] == [1, 5, 5 * 60 + math.comb(5, 2)]
    for length in (0, 1, 150, len(counts) - 1):
        paths = rp.sample_paths(chain, length, 3, torch.Generator().manual_seed(0))
        assert [path_length(check_path(chain.path_choices, path)) for path in paths] == [length] * 3


def test_scaling_a_chain_inside_a_branch_keeps_its_paths():
    block = Recipe(2, "identity")
    chain = build((Recipe(2, "identity", (block, block)), block))
    assert chain.num_paths == 10
    assert rp.scale_block(chain, 0, 2.0).num_paths == 10


def test_enumeration_of_a_length_is_lazy_inside_branches(monkeypatch):
    calls = []
    monkeypatch.setattr(paths_module, "path_length", lambda path: calls.append(None) or path_length(path))
    inner = ((False, True),) * 14
    assert next(rp.enumerate_paths(Chain([(False, inner)]), length=15)) == ((True,) * 14,)
    assert len(calls) < 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rp.path_histogram(-1), r"chain: got -1; allowed: .* at least 0"),
        (lambda: rp.path_histogram(True), r"chain: got True"),
        (
            lambda: rp.path_histogram(54, unit="weight_layer"),
            r"unit: got 'weight_layer'; allowed: 'block' for a number of blocks",
        ),
        (lambda: rp.path_histogram(3, "banana"), r"unit: got 'banana'; allowed: 'block'"),
        (lambda: rp.path_histogram("resnet"), r"chain: got 'str'; allowed: a ResidualChain.*unravel"),
        (lambda: rp.enumerate_paths(3, length=4), r"length: got 4; allowed: an int from 0 to 3"),
        (lambda: rp.enumerate_paths(Chain([(True,), (False, True)]), length=0), r"length: got 0; .* from 1 to 2"),
        (lambda: rp.sample_paths(3, 1, -1, torch.Generator()), r"num_samples: got -1"),
        (lambda: check_path([(False, True)], (True, True)), r"path: got .* allowed: 1 entries"),
        (lambda: check_path([(False,)], (True,)), r"path\[0\]: got True; allowed: one of \(False,\)"),
        (lambda: check_path([(False, ((False, True),))], (True,)), r"path\[0\]: got True; allowed: one of"),
        (lambda: check_path([(False, ((False, True),))], ((True, True),)), r"path: got .* allowed: 1 entries"),
        (lambda: check_path([(False, ((True,),))], ((False,),)), r"path\[0\]: got False; allowed: one of \(True,\)"),
        (lambda: check_path([(False, True)], ((True,),)), r"path\[0\]: got \(True,\); allowed: one of"),
        (lambda: rp.sample_paths(Chain([(((True,),),)]), 1, 1, torch.Generator()), r"length: got 1; .* from 2 to 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        call()

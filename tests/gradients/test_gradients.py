"""Gradients by path length, exactly: against enumeration, autograd and roots of unity."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import resnet_paths as rp
from resnet_paths.core.backward import cotangents
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.paths import path_length, path_polynomial
from resnet_paths.gradients import gradient_by_stage_lengths, gradient_through_block
from resnet_paths.gradients.points import Place, num_block_vjps
from tests.gradients.gradient_reference import (
    Recipe,
    assert_close,
    assert_column,
    batch,
    build,
    by_length,
    cross_entropy,
    detached_gradient,
    gated_gradients,
    norms_and_shares,
    path_gradients,
    product_paths,
    recipes,
    seeded,
    summed,
    vectors_of,
)

gradients_of = rp.gradient_by_path_length
RESIDUAL = Recipe(3, "identity")


def residual_chain(num_blocks):
    """Residual blocks of one width, three to a stage."""
    return build((RESIDUAL,) * num_blocks)


def varied_chain():
    """Every kind of block at once."""
    inside = (Recipe(2, "identity", post=True), Recipe(3, "projection", 2), Recipe(1, "none"))
    return build((
        Recipe(3, "identity", pre=True),
        Recipe(2, "projection", 2, pre=True, post=True),
        Recipe(2, "concat"),
        Recipe(4, "identity", inside, post=True),
        Recipe(3, "none"),
        Recipe(3, "identity", "scaled", copies=2),
        Recipe(2, "projection", deleted=True),
        Recipe(2, "identity", "chain"),
    ))


def check_frame(frame, sums, num_paths):
    """A frame's rows are these sums over paths, by path length."""
    assert frame.path_length.tolist() == list(sums)
    assert frame.num_paths.tolist() == [num_paths[k] for k in sums]
    assert all(type(count) is int for count in frame.num_paths)
    norms, shares = norms_and_shares(sums)
    assert_column(frame, "summed_path_gradient_norm", norms)
    assert_column(frame, "gradient_share", shares)
    assert not frame.underflowed.any()


def check_everything(chain):
    inputs, targets = batch()
    expected = path_gradients(chain, inputs, targets)
    assert list(expected) == list(rp.enumerate_paths(chain)) == product_paths(chain)
    sums = summed(expected)

    leaf = inputs.clone().requires_grad_()
    (whole,) = torch.autograd.grad(cross_entropy(chain(leaf), targets).sum(), leaf)
    found = by_length(chain, inputs, targets)
    assert_close(sum(found.values()), whole)
    assert_close(sum(sums.values()), whole)
    assert_close(torch.stack([found[k] for k in sums]), torch.stack(list(sums.values())))
    nothing = torch.zeros_like(inputs)
    every = torch.stack([found.get(k, nothing) for k in range(max(sums) + 1)])
    gated = gated_gradients(chain, inputs, targets, max(sums))
    assert_close(gated.real, every)
    assert_close(gated.imag, torch.zeros_like(every), scale=float(every.abs().max()))

    frame = gradients_of(chain, inputs, targets)
    check_frame(frame, sums, Counter(map(path_length, expected)))
    assert frame.attrs["omitted_share"] == pytest.approx(0, abs=1e-9 * max(1, frame.gradient_share.abs().max()))


@settings(max_examples=140, deadline=None, derandomize=True)
@given(recipes(), st.integers(0, 3))
def test_sums_over_paths_of_random_chains(recipe, seed):
    check_everything(build(recipe, seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(recipes(8, of_pairs=True), st.integers(0, 3))
def test_sums_over_paths_where_the_state_is_a_pair(recipe, seed):
    check_everything(build(recipe, seed, of_pairs=True))


def test_the_chain_of_every_kind_of_block():
    chain = varied_chain()
    assert {b.skip_kind for b in chain} == {"identity", "projection", "concat", None}
    check_everything(chain)


def test_the_reference_agrees_with_detaching_every_other_side():
    chain = build((
        Recipe(2, "concat"),
        Recipe(3, "projection", 2, pre=True),
        Recipe(3, "none", post=True),
        Recipe(3, "identity", 3, post=True),
        Recipe(2, "identity", deleted=True),
    ))
    for path, gradient in path_gradients(chain, *batch()).items():
        assert_close(gradient, detached_gradient(chain, *batch(), path), 1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.booleans().flatmap(lambda pairs: st.tuples(st.just(pairs), recipes(6, of_pairs=pairs))), st.integers(1, 70))
def test_single_paths(kind, num_rows):
    """In any order, with repeats, all at once."""
    of_pairs, recipe = kind
    chain = build(recipe, of_pairs=of_pairs)
    inputs, targets = batch()
    expected = path_gradients(chain, inputs, targets)
    generator = torch.Generator().manual_seed(0)
    paths = [list(expected)[i] for i in torch.randint(len(expected), (num_rows,), generator=generator)]
    (point,) = Place.of(chain, "input").points(inputs, targets, None, 2**31, 1)
    for _ in range(2):  # the point itself must not be used up
        found = vectors_of(point.of_paths(paths))
        assert_close(found, torch.stack([expected[path] for path in paths]))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(recipes(6))
def test_stacks_larger_than_the_caches_are_taken_in_pieces(recipe):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cotangents, "_CHUNK_BYTES", 100)
        check_everything(build(recipe))


# Places


@settings(max_examples=16, deadline=None, derandomize=True)
@given(st.booleans().flatmap(lambda pairs: st.tuples(st.just(pairs), recipes(6, of_pairs=pairs))), st.data())
def test_every_place(kind, data):
    of_pairs, recipe = kind
    chain = build(recipe, of_pairs=of_pairs)
    index = data.draw(st.integers(-len(chain), len(chain) - 1))
    places = ["stem", index, chain[index].name]
    if any(True for _ in chain[index].parameters()):
        places.append(("parameters", chain[index].name))
    for place in places:
        expected = path_gradients(chain, *batch(), place)
        frame = gradients_of(chain, *batch(), with_respect_to=place)
        check_frame(frame, summed(expected), Counter(map(path_length, expected)))
        assert frame.attrs["with_respect_to"] == place


@pytest.mark.parametrize("index", [0, 1, 3, 4])
def test_parameter_gradients_add_up_to_autograds(index):
    chain = varied_chain()
    inputs, targets = batch()
    losses = cross_entropy(chain(inputs), targets)
    parameters = list(chain[index].parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    whole = torch.stack([
        torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(row, parameters, strict=True)])
        for row in rows
    ])
    place = ("parameters", index)
    found = by_length(chain, inputs, targets, place)
    assert_close(sum(found.values()), whole)
    frame = gradients_of(chain, inputs, targets, with_respect_to=place)
    # An example's gradient is that of a batch of this example alone.
    alone = [gradients_of(chain, inputs[i : i + 1], targets[i : i + 1], with_respect_to=place) for i in range(3)]
    assert_close(frame.gradient_share, np.mean([f.gradient_share for f in alone], 0))


def test_parameters_of_a_block_that_runs_twice_are_those_of_its_position():
    chain = rp.duplicate_block(residual_chain(3), 1)
    inputs, targets = batch()
    found = [sum(by_length(chain, inputs, targets, ("parameters", i)).values()) for i in (1, 2)]
    rows = [
        torch.autograd.grad(loss, list(chain[1].parameters()), retain_graph=True)
        for loss in cross_entropy(chain(inputs), targets)
    ]
    assert_close(found[0] + found[1], torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))


def test_several_inputs():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(5, 3), nn.Linear(2, 3)

        def forward(self, x, y):
            return torch.tanh(self.left(x)) * self.right(y)

    with seeded():
        chain = residual_chain(3)
        chain = ResidualChain(Stem().double(), chain, chain.head).eval()
        inputs, targets = (batch()[0], torch.randn(3, 2, dtype=torch.float64)), batch()[1]
    expected = summed(path_gradients(chain, inputs, targets))
    check_frame(gradients_of(chain, inputs, targets), expected, [1, 3, 3, 1])
    loader = [([x[:2] for x in inputs], targets[:2]), (tuple(x[2:] for x in inputs), targets[2:])]
    check_frame(gradients_of(chain, loader, progress=False), expected, [1, 3, 3, 1])


# Options


@settings(max_examples=25, deadline=None, derandomize=True)
@given(recipes(6), st.data())
def test_a_limit_to_the_length_leaves_the_shorter_paths_as_they_were(recipe, data):
    chain = build(recipe)
    full = gradients_of(chain, *batch())
    limit = data.draw(st.integers(full.path_length.min(), full.path_length.max()))
    frame = gradients_of(chain, *batch(), max_length=limit)
    rows = full[full.path_length <= limit]
    largest = full.gradient_share.abs().max()
    for name in ("path_length", "num_paths", "summed_path_gradient_norm", "summed_path_gradient_norm_se"):
        assert_close(frame[name], rows[name])
    assert_close(frame.gradient_share, rows.gradient_share, scale=largest)
    rest = full.gradient_share[full.path_length > limit].sum()
    assert frame.attrs["omitted_share"] == pytest.approx(rest, abs=1e-9 * max(1, largest))


def test_the_batch_as_one_measurement():
    chain = varied_chain()
    inputs, targets = batch(7)
    frame = gradients_of(chain, inputs, targets, per_example=False)
    leaf = inputs.clone().requires_grad_()
    (whole,) = torch.autograd.grad(F.cross_entropy(chain(leaf), targets), leaf)
    sums = {k: v / 7 for k, v in summed(path_gradients(chain, inputs, targets)).items()}
    assert_close(sum(sums.values()), whole)
    assert_close(frame.summed_path_gradient_norm, [v.norm() for v in sums.values()])
    assert_close(frame.gradient_share, [(v * whole).sum() / whole.square().sum() for v in sums.values()])
    assert frame.gradient_share_se.isna().all()
    assert not frame.attrs["per_example"]
    # With a loader the means and errors are over batches.
    parts = [slice(0, 2), slice(2, 4), slice(4, 7)]
    loader = [(inputs[part], targets[part]) for part in parts]
    together = gradients_of(chain, loader, per_example=False, progress=False)
    alone = [gradients_of(chain, x, y, per_example=False, memory_budget=1) for x, y in loader]
    for name in ("summed_path_gradient_norm", "gradient_share"):
        assert_column(together, name, torch.tensor(np.array([f[name] for f in alone]).T))
    assert together.attrs["num_examples"] == 7


@pytest.mark.parametrize("place", ["input", 1, ("parameters", 2)])
def test_batches_of_a_loader_and_a_small_memory_change_nothing(place):
    chain = varied_chain()
    inputs, targets = batch(7)
    frame = gradients_of(chain, inputs, targets, with_respect_to=place)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=3)
    others = [
        gradients_of(chain, loader, with_respect_to=place, progress=False),
        gradients_of(chain, [(inputs, targets)], with_respect_to=place, progress=False),
        gradients_of(chain, inputs, targets, with_respect_to=place, memory_budget=1),
        gradients_of(chain, inputs, targets, with_respect_to=place, memory_budget=60_000),
    ]
    for other in others:
        assert list(other.columns) == list(frame.columns)
        for name in frame.columns[2:-1]:
            assert_close(other[name], frame[name])
        assert other.attrs["num_examples"] == 7


def test_losses_of_the_users_own():
    chain = varied_chain()
    inputs, targets = batch()

    def loss(logits, weights):
        return (logits.square() * weights).sum(1)

    weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = summed(path_gradients(chain, inputs, weights, loss=loss))
    counts = path_polynomial(chain)
    for budget in (2**31, 1):
        check_frame(gradients_of(chain, inputs, weights, loss=loss, memory_budget=budget), expected, counts)
    # Targets may be a tuple, or none at all.
    of_tuple = gradients_of(chain, inputs, (weights, targets), loss=lambda z, t: loss(z, t[0]), memory_budget=1)
    check_frame(of_tuple, expected, counts)
    first = gradients_of(chain, inputs, loss=lambda logits, _: logits[:, 0])
    check_frame(first, summed(path_gradients(chain, inputs, None, loss=lambda z, _: z[:, 0])), counts)


def test_the_number_of_block_vjps_is_what_it_costs():
    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 0.5 * x

        @staticmethod
        def backward(ctx, gradient):
            assert gradient.isfinite().all()  # depends on the data: vmap cannot run this
            calls.append(None)
            return 0.5 * gradient

    class Half(nn.Module):
        def forward(self, x):
            return Counted.apply(x)

    calls: list[None] = []
    inside = ResidualChain(nn.Identity(), [Block(Half(), nn.Identity(), name=f"{i}") for i in range(2)], nn.Identity())
    for middle in (Half(), inside):
        blocks = [Block(f, nn.Identity(), name=f"b{i}") for i, f in enumerate([Half(), Half(), middle, Half(), Half()])]
        chain = ResidualChain(nn.Linear(5, 3), blocks, nn.Linear(3, 3)).double().eval()
        counts = path_polynomial(chain)
        for limit in range(len(counts)):
            (point,) = Place.of(chain, "stem").points(*batch(), None, 2**31, 1)
            frame = gradients_of(chain, *batch(), max_length=limit)
            calls.clear()
            point.by_length(limit)
            assert len(calls) == num_block_vjps(chain.path_choices, limit) == frame.attrs["num_block_vjps"]
        expected = summed(path_gradients(chain, *batch()))
        check_frame(gradients_of(chain, *batch()), expected, counts)


# Stages and blocks


def stages_of(chain, place):
    """Positions of the blocks above a place, stage by stage."""
    start = 0 if place in ("input", "stem") else chain.block_index(place) + 1
    runs: list[list[int]] = []
    for i in range(start, len(chain)):
        if i == start or chain[i].stage != chain[i - 1].stage:
            runs.append([])
        runs[-1].append(i - start)
    return start, runs


@settings(max_examples=16, deadline=None, derandomize=True)
@given(st.booleans().flatmap(lambda pairs: st.tuples(st.just(pairs), recipes(8, of_pairs=pairs))), st.data())
def test_lengths_by_stage(kind, data):
    of_pairs, recipe = kind
    chain = build(recipe, of_pairs=of_pairs)
    place = data.draw(st.sampled_from(["input", "stem", 0]))
    _, runs = stages_of(chain, place)
    expected = path_gradients(chain, *batch(), place)

    def key(path):
        return tuple(path_length([path[i] for i in run]) for run in runs)

    sums = summed(expected, key)
    for budget in (2**31, 1):
        frame = gradient_by_stage_lengths(chain, *batch(), with_respect_to=place, memory_budget=budget)
        columns = [name for name in frame.columns if name.startswith("path_length_stage")]
        assert [tuple(row) for row in frame[columns].to_numpy().tolist()] == list(sums)
        assert frame.num_paths.tolist() == [Counter(map(key, expected))[k] for k in sums]
        norms, shares = norms_and_shares(sums)
        assert_column(frame, "summed_path_gradient_norm", norms)
        assert_column(frame, "gradient_share", shares)

    by_sum = frame.assign(path_length=sum((frame[name] for name in columns), start=0 * frame.num_paths.astype(int)))
    marginal = by_sum.groupby("path_length")[["num_paths", "gradient_share"]].sum()
    whole = gradients_of(chain, *batch(), with_respect_to=place).set_index("path_length")
    assert marginal.num_paths.tolist() == [n for n in path_polynomial(Place.of(chain, place).above) if n]
    assert_close(marginal.gradient_share, whole.gradient_share, 1e-9, frame.gradient_share.abs().max())


def test_lengths_by_stage_over_a_loader():
    chain = residual_chain(7)
    inputs, targets = batch(5)
    frame = gradient_by_stage_lengths(chain, inputs, targets)
    assert frame.columns[:3].tolist() == [f"path_length_stage{s}" for s in (0, 1, 2)]
    assert frame.num_paths.tolist() == [
        math.comb(3, i) * math.comb(3, j) * math.comb(1, k) for i in range(4) for j in range(4) for k in range(2)
    ]
    loader = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    other = gradient_by_stage_lengths(chain, loader, progress=False)
    for name in frame.columns:
        assert_close(other[name], frame[name])


def test_stages_keep_their_numbers_above_a_block():
    frame = gradient_by_stage_lengths(residual_chain(7), *batch(), with_respect_to=3)
    assert frame.columns[:2].tolist() == ["path_length_stage1", "path_length_stage2"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.booleans().flatmap(lambda pairs: st.tuples(st.just(pairs), recipes(8, of_pairs=pairs))), st.data())
def test_the_share_through_each_block(kind, data):
    of_pairs, recipe = kind
    chain = build(recipe, of_pairs=of_pairs)
    place = data.draw(st.sampled_from(["input", "stem", 0]))
    start, _ = stages_of(chain, place)
    expected = path_gradients(chain, *batch(), place)
    whole = sum(expected.values())
    through = torch.zeros(len(chain) - start, *whole.shape, dtype=torch.float64)
    for path, gradient in expected.items():
        through[[bool(entry) for entry in path]] += gradient
    shares = (through * whole).sum(2) / whole.square().sum(1)
    scale = max([1.0, *shares.abs().flatten().tolist()])
    for budget in (2**31, 1):
        frame = gradient_through_block(chain, *batch(), with_respect_to=place, memory_budget=budget, norms=True)
        assert frame.block_index.tolist() == list(range(start, len(chain)))
        assert frame.block.tolist() == [b.name for b in chain][start:]
        assert frame.stage.tolist() == [b.stage for b in chain][start:]
        if len(frame):
            assert_column(frame, "gradient_share_through_branch", shares, scale=scale)
            assert_column(frame, "path_gradient_norm_through_branch", through.norm(dim=2))
    if not any(isinstance(b.branch, ResidualChain) for b in chain):
        lengths = gradients_of(chain, *batch(), with_respect_to=place)
        mean_length = (lengths.path_length * lengths.gradient_share).sum()
        assert frame.gradient_share_through_branch.sum() == pytest.approx(mean_length, abs=1e-9 * scale * len(chain))


# Chains that are unusual


@pytest.mark.parametrize("kind", ["post", "head", "pre", "deleted", "stem"])
def test_parts_that_work_in_place(kind):
    def make(inplace):
        chain = build((Recipe(3, "identity", post=True), Recipe(3, "identity")))
        part = nn.ELU(inplace=inplace)
        where = "post" if kind == "deleted" else kind
        if where in ("pre", "post"):
            chain = chain.with_blocks(block.replace(**{where: part}) for block in chain)
        ends = [nn.Sequential(part, f) if where == k else f for k, f in (("stem", chain.stem), ("head", chain.head))]
        chain = ResidualChain(ends[0], chain, ends[1]).eval()
        return rp.delete_block(chain, 0) if kind == "deleted" else chain

    inplace, ordinary = make(True), make(False)
    inputs, targets = batch()
    assert_close(inplace(inputs.clone()), ordinary(inputs), 1e-14)
    expected = summed(path_gradients(ordinary, inputs, targets))
    check_frame(gradients_of(inplace, inputs, targets), expected, path_polynomial(ordinary))
    assert torch.equal(inputs, batch()[0])


def test_parameters_of_blocks_that_work_in_place():
    place, chain = ("parameters", 1), residual_chain(3)
    inplace, ordinary = (chain.with_blocks(b.replace(pre=nn.ELU(inplace=i)) for b in chain) for i in (True, False))
    expected = summed(path_gradients(ordinary, *batch(), place))
    check_frame(gradients_of(inplace, *batch(), with_respect_to=place), expected, [1, 1])


class Named(NamedTuple):
    classes: torch.Tensor
    weights: torch.Tensor


PACKS = [list, lambda pair: dict(zip("yw", pair, strict=True)), lambda pair: Named(*pair)]


@pytest.mark.parametrize("pack", PACKS, ids=["list", "dict", "named tuple"])
def test_targets_of_a_loader_may_be_any_collection(pack):
    def loss(logits, targets):
        classes, weights = targets.values() if isinstance(targets, dict) else targets
        return cross_entropy(logits, classes) * weights

    inputs, classes = batch()
    loader = [(inputs, pack([classes, torch.arange(1.0, 4.0, dtype=torch.float64)]))]
    whole, split = (
        gradients_of(residual_chain(3), loader, loss=loss, memory_budget=n, progress=False) for n in (2**31, 1)
    )
    assert_close(split.gradient_share, whole.gradient_share)

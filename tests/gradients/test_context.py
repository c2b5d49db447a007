"""Gradients through what blocks read beside the state, against autograd with a gate on every branch."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import LinearCombination, Parallel, call_part
from resnet_paths.core.paths import path_length
from resnet_paths.gradients import gradient_by_stage_lengths, gradient_through_block
from resnet_paths.gradients.points import Place
from tests.gradients.gradient_reference import assert_close, seeded, vectors_of

WIDTH = 3


class Stem(nn.Module):
    """The first state; a gate made of the second input; the first state again; a truth value that has no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.gate = nn.Linear(5, WIDTH), nn.Linear(4, WIDTH)

    def forward(self, x, other):
        state = self.first(x)
        return state, torch.tanh(self.gate(other)), state, other[:, :1] > 0


class Reads(nn.Module):
    """A map of the state that reads some of the context."""

    def __init__(self, *names):
        super().__init__()
        self.reads_context = names
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, gate=None, first=None, truth=None):
        y = torch.tanh(self.layer(x))
        y = y if gate is None else y * gate + gate.square()
        y = y if first is None else y + torch.sin(first) * x
        return y if truth is None else torch.where(truth, y, 0.5 * y)


class Head(nn.Module):
    reads_context = ("gate", "first")

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x, gate, first):
        return self.out(x * gate + first)


def blocks_of(kind):
    if kind == "one after the other":
        return [Block(Reads("gate", "truth"), nn.Identity(), name=f"{i}") for i in range(3)]
    if kind == "first state":
        return [Block(Reads("first"), nn.Identity(), name=f"{i}") for i in range(3)]
    if kind == "everywhere":
        return [
            Block(Reads("gate", "first"), Reads("gate"), pre=Reads("first"), post=Reads("gate", "truth"), name="a"),
            Block(
                Parallel([Reads("gate"), LinearCombination([Reads("first")], [0.5]), Reads()]),
                nn.Identity(),
                name="b",
                stage=1,
            ),
            Block(None, Reads("gate"), name="c", stage=1),
        ]
    inner = [Block(Reads("gate"), nn.Identity(), name="x"), Block(Reads("first"), Reads("gate"), name="y")]
    inside = ResidualChain(Reads("gate"), inner, Reads("first"))
    return [
        Block(Reads("gate"), nn.Identity(), name="a"),
        Block(inside, nn.Identity(), name="b", stage=1),
        Block(Reads(), Reads("truth"), pre=Reads(), name="c", stage=1),
    ]


KINDS = ["one after the other", "first state", "everywhere", "chain inside"]


@functools.cache
def chain_of(kind):
    with seeded():
        return ResidualChain(Stem(), blocks_of(kind), Head(), ["gate", "first", "truth"]).double().eval()


def batch(size=3):
    generator = torch.Generator().manual_seed(2)
    x, other = (torch.randn(size, width, generator=generator, dtype=torch.float64) for width in (5, 4))
    return (x, other), torch.arange(size) % 3


class Gate(torch.autograd.Function):
    """The identity, with the gradient times a number."""

    @staticmethod
    def forward(ctx, y, factor):
        ctx.factor = factor
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def run(blocks, state, context, factor_of, positions):
    """The blocks with a gate after every branch; `factor_of` the position of the branch."""
    for index, block in enumerate(blocks):
        shared = call_part(block.pre, state, context)
        total = 0 if block.skip is None else call_part(block.skip, shared, context)
        branches = block.branch if isinstance(block.branch, Parallel) else [block.branch] * (block.branch is not None)
        for number, branch in enumerate(branches):
            place = (*positions, index, number)
            if isinstance(branch, ResidualChain):
                y = run(branch, call_part(branch.stem, shared, context), context, factor_of, place)
                y = call_part(branch.head, y, context)
            else:
                y = call_part(branch, shared, context)
            total = total + Gate.apply(y, factor_of(place))
        state = call_part(block.post, total, context)
    return state


def gated(kind, factor_of, place):
    """The gradients of all examples at a place, side by side, with gates after branches."""
    chain, (inputs, targets) = chain_of(kind), batch()
    leaves = [t.clone().requires_grad_() for t in inputs]
    state, context = chain.begin(*leaves)
    start = 0
    wanted = leaves if place == "input" else [state, context["gate"]]
    if isinstance(place, int):
        state = run(list(chain)[: place + 1], state, context, lambda _: 1, ()).detach().requires_grad_()
        context = {name: value.detach() for name, value in context.items()}
        start, wanted = place + 1, [state]
    end = run(list(chain)[start:], state, context, factor_of, ())
    losses = F.cross_entropy(call_part(chain.head, end, context), targets, reduction="sum")
    found = torch.autograd.grad(losses, wanted, allow_unused=True)
    return torch.cat([torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)], 1)


def sums_by_length(kind, place):
    """Coefficients of the polynomial in a gate that all branches share, [length, batch, features]."""
    longest = len(rp.path_histogram(chain_of(kind))) - 1
    gates = np.linspace(-1, 1, longest + 1)
    values = np.stack([gated(kind, lambda _, t=t: t, place).numpy() for t in gates])
    coefficients = np.linalg.solve(np.vander(gates, increasing=True), values.reshape(len(gates), -1))
    return torch.from_numpy(coefficients.reshape(values.shape))


def point_of(kind, place):
    inputs, targets = batch()
    (point,) = Place.of(chain_of(kind), place).points(inputs, targets, None, 2**31, 1)
    return point


@pytest.mark.parametrize("place", ["input", "stem", 0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_the_paths_of_each_length(kind, place):
    expected = sums_by_length(kind, place)
    point = point_of(kind, place)
    stack = point.by_length(len(expected) - 1)
    found = torch.zeros_like(expected)
    found[stack.shortest : stack.longest + 1] = vectors_of(stack)
    assert_close(found, expected)
    assert_close(vectors_of(point.whole)[0], gated(kind, lambda _: 1.0, place))
    frame = rp.gradient_by_path_length(chain_of(kind), *batch(), with_respect_to=place)
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)
    assert_close(frame.summed_path_gradient_norm, expected[frame.path_length.tolist()].norm(dim=2).mean(1))
    limited = rp.gradient_by_path_length(
        chain_of(kind), *batch(), with_respect_to=place, max_length=min(1, len(frame) - 1)
    )
    assert_close(limited.summed_path_gradient_norm, frame.summed_path_gradient_norm[:2])


@pytest.mark.parametrize("place", ["input", "stem", 0])
@pytest.mark.parametrize("kind", KINDS)
def test_single_paths_and_energies(kind, place):
    """By all signs of all branches: the mean of the signed gradient times the path's signs is the path's own."""
    chain, point = chain_of(kind), point_of(kind, place)
    seen = []
    gated(kind, lambda branch: seen.append(branch) or 1.0, place)
    start = place + 1 if place == 0 else 0
    combinations = list(itertools.product([1.0, -1.0], repeat=len(seen)))
    signed = [gated(kind, lambda b, s=signs: s[seen.index(b)], place) for signs in combinations]
    paths = [p[start:] for p in itertools.product(*map(entries, chain))]
    paths = list(dict.fromkeys(paths))
    expected = []
    for path in paths:
        taken = [seen.index(branch) for branch in branches_on(path, ())]
        factors = [np.prod([signs[i] for i in taken]) for signs in combinations]
        expected.append(sum(f * g for f, g in zip(factors, signed, strict=True)) / len(combinations))
    assert_close(vectors_of(point.of_paths(paths)), torch.stack(expected))
    assert_close(sum(expected), gated(kind, lambda _: 1.0, place))

    columns = torch.tensor(combinations)
    drawn = []

    def draw_signs():  # branches are drawn last block first, the branches of a block in order
        drawn.append(None)
        return columns[:, seen.index(order[len(drawn) - 1])][:, None].expand(-1, 3)

    order = list(draw_order(list(chain)[start:], ()))
    stack = point.by_length(max(map(path_length, paths)), len(combinations), draw_signs)
    energies = (point.norms(stack)[0] ** 2).mean(1)
    for length in sorted(set(map(path_length, paths))):
        of_length = sum(g.square().sum(1) for p, g in zip(paths, expected, strict=True) if path_length(p) == length)
        assert_close(energies[length - stack.shortest], of_length)


def entries(block):
    skip = [False] if block.skip is not None else []
    if isinstance(block.branch, ResidualChain):
        return skip + list(itertools.product(*map(entries, block.branch)))
    count = len(block.branch) if isinstance(block.branch, Parallel) else int(block.branch is not None)
    return skip + list(range(1, count + 1))


def branches_on(path, positions):
    for index, entry in enumerate(path):
        if isinstance(entry, tuple):
            yield (*positions, index, 0)
            yield from branches_on(entry, (*positions, index, 0))
        elif entry:
            yield (*positions, index, entry - 1)


def draw_order(blocks, positions):
    for index in reversed(range(len(blocks))):
        branch = blocks[index].branch
        branches = branch if isinstance(branch, Parallel) else [branch] * (branch is not None)
        for number, one in enumerate(branches):
            yield (*positions, index, number)
            if isinstance(one, ResidualChain):
                yield from draw_order(list(one), (*positions, index, number))


@pytest.mark.parametrize("place", ["input", "stem"])
@pytest.mark.parametrize("kind", KINDS)
def test_stages_blocks_and_depth(kind, place):
    chain = chain_of(kind)
    whole = gated(kind, lambda _: 1.0, place)
    squares = whole.square().sum(1)

    frame = gradient_through_block(chain, *batch(), with_respect_to=place, norms=True, progress=False)
    fast = gradient_through_block(chain, *batch(), with_respect_to=place, progress=False)
    assert_close(fast.gradient_share_through_branch, frame.gradient_share_through_branch, scale=1.0)
    for index, block in enumerate(chain):
        without = gated(kind, lambda b, i=index: float(b[0] != i), place)
        through = whole - without
        assert_close(frame.path_gradient_norm_through_branch[index], through.norm(dim=1).mean(), scale=1.0)
        share = ((through * whole).sum(1) / squares).mean()
        assert_close(frame.gradient_share_through_branch[index], share, scale=1.0)
        assert frame.block[index] == block.name

    by_stage = gradient_by_stage_lengths(chain, *batch(), with_respect_to=place, progress=False)
    exact = rp.gradient_by_path_length(chain, *batch(), with_respect_to=place)
    columns = [name for name in by_stage if name.startswith("path_length_stage")]
    summed = by_stage.groupby(by_stage[columns].sum(axis=1)).gradient_share.sum()
    assert_close(summed, exact.gradient_share)

    depth = rp.gradient_by_depth(chain, *batch(), progress=False)
    assert_close(depth.gradient_norm[0], gated(kind, lambda _: 1.0, "stem").norm(dim=1).mean())
    for index in range(len(chain)):
        norm = gated(kind, lambda _: 1.0, index).norm(dim=1).mean()
        assert_close(depth.gradient_norm[index + 1], norm)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_parameters_of_blocks_that_read_context(kind):
    chain, (inputs, targets) = chain_of(kind), batch()
    frame = rp.gradient_by_path_length(chain, inputs, targets, with_respect_to=("parameters", 0))
    norms = []
    for i in range(3):
        losses = F.cross_entropy(chain(*(t[i : i + 1] for t in inputs)), targets[i : i + 1])
        parameters = list(chain[0].parameters())
        found = torch.autograd.grad(losses, parameters, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in found if g is not None]).norm())
    only = rp.gradient_by_path_length(chain, inputs, targets, with_respect_to=("parameters", 0), per_example=True)
    assert only.gradient_share.sum() == pytest.approx(1, abs=1e-12)
    point = point_of(kind, ("parameters", 0))
    assert_close(point.norms(point.whole)[0][0, 0], torch.stack(norms))
    assert len(frame) == len(only)


class Shared(nn.Module):
    """A row that all examples share, or a table without any batch, for all blocks to read."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, row):
        state = F.one_hot(tokens, WIDTH).to(row.dtype)
        return state, row.tanh()[0] if self.table else row.tanh()


@pytest.mark.parametrize("of_each", [False, True])
def test_a_row_that_all_examples_share_has_a_gradient_of_each(of_each):
    with seeded():
        blocks = [Block(Reads("gate"), nn.Identity(), name=f"{i}") for i in range(2)]
        chain = ResidualChain(Shared(False), blocks, nn.Linear(WIDTH, 3), ["gate"]).double().eval()
    tokens, row = torch.tensor([0, 1, 2, 1]), torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 0])
    given = row.expand(4, -1) if of_each else row
    frame = rp.gradient_by_path_length(chain, (tokens, given), targets, with_respect_to="stem")
    norms = []
    for i in range(4):
        state, context = (t.detach().requires_grad_() for t in chain.stem(tokens[i : i + 1], row))
        end = state
        for block in chain:
            end = block(end, gate=context)
        loss = F.cross_entropy(chain.head(end), targets[i : i + 1])
        norms.append(torch.cat(torch.autograd.grad(loss, (state, context)), 1).norm())
    (point,) = Place.of(chain, "stem").points((tokens, given), targets, None, 2**31, 1)
    assert_close(point.norms(point.whole)[0][0, 0], torch.stack(norms))
    little = rp.gradient_by_path_length(chain, (tokens, given), targets, with_respect_to="stem", memory_budget=1)
    assert_close(little.summed_path_gradient_norm, frame.summed_path_gradient_norm)


def test_context_without_a_batch_is_refused_where_it_carries_a_gradient():
    with seeded():
        blocks = [Block(Reads("gate"), nn.Identity(), name=f"{i}") for i in range(2)]
        chain = ResidualChain(Shared(True), blocks, nn.Linear(WIDTH, 3), ["gate"]).double().eval()
    inputs, targets = (torch.tensor([0, 1]), torch.ones(1, WIDTH, dtype=torch.float64)), torch.tensor([0, 1])
    with pytest.raises(rp.ResnetPathsError, match=r"inputs: got \"'gate' \[3\].*Take the output of a block"):
        rp.gradient_by_path_length(chain, inputs, targets, with_respect_to="stem")
    frame = rp.gradient_by_path_length(chain, inputs, targets, with_respect_to=0)
    assert frame.gradient_share.sum() == pytest.approx(1, abs=1e-12)


def test_blocks_without_a_skip_hand_the_gradient_of_the_context_on():
    """Its paths count among those that continue through the only branch there is."""
    with seeded():
        names = [("gate",), ("first", "gate"), ()]
        blocks = [Block(Reads(*read), None, name=f"{i}") for i, read in enumerate(names)]
        chain = ResidualChain(Stem(), blocks, Head(), ["gate", "first", "truth"]).double().eval()
    inputs, targets = batch()
    leaves = [t.clone().requires_grad_() for t in inputs]
    whole = torch.autograd.grad(F.cross_entropy(chain(*leaves), targets, reduction="sum"), leaves)
    norms = torch.cat(whole, 1).norm(dim=1)
    study = functools.partial(rp.gradient_by_path_length, chain, inputs, targets)
    exact, energy, sampled = study(), study(method="energy", num_draws=2), study(method="sampled", num_draws=2)
    assert exact.path_length.tolist() == [3]
    assert_close(exact.summed_path_gradient_norm, [norms.mean()])
    assert_close(energy.rms_path_gradient_norm, [norms.square().mean().sqrt()])
    assert_close(sampled.mean_path_gradient_norm, [norms.mean()])

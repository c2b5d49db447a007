"""Studies with options: stacked and split batches, memory that runs out, counts by class, re-estimated BatchNorm."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.lesions.lesion import Lesion
from resnet_paths.lesions.trie import Trie
from tests.chains import Plan, assert_same, inputs, plans, random_chain, random_model, snapshot
from tests.gradients.gradient_reference import build, recipes, seeded
from tests.lesions.test_lesion_trie import EDITS, edited
from tests.lesions.test_lesions import STEADY, labelled, one_by_one
from tests.utils.test_statistics import score_bounds


def study(chain, loader, lesions=None, **options):
    lesions = rp.single_deletions(chain) if lesions is None else lesions
    return rp.lesion_study(chain, loader, lesions, progress=False, **options)


def near(one, other, columns=("error_rate", "error_rate_increase", "num_not_finite", "num_examples")):
    """Whether two frames hold the same counts, and losses but for rounding."""
    assert one[[*columns]].equals(other[[*columns]])
    assert np.allclose(one.cross_entropy, other.cross_entropy, rtol=1e-9)


# Stacked and split batches


class Recording(nn.Module):
    """A part that notes how many examples it is given, and runs out of memory above `most`."""

    def __init__(self, part, most=math.inf):
        super().__init__()
        self.part, self.most, self.sizes = part, most, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB.")
        return self.part(x)


def recorded(chain, most=math.inf):
    blocks = [b.replace(branch=Recording(b.branch, most)) for b in chain]
    return ResidualChain(Recording(chain.stem, most), blocks, Recording(chain.head, most)).eval()


def sizes_in(chain):
    parts = [chain.stem, chain.head, *(b.branch for b in chain)]
    return [size for part in parts for size in part.sizes]


@settings(max_examples=25, deadline=None)
@given(plans(min_blocks=2, max_blocks=6), EDITS, st.integers(1, 60))
def test_a_budget_changes_no_number(plan, edits, budget):
    chain, loader = random_chain(plan), labelled()
    lesions = [lambda c, e=edit: edited(c, *e) for edit in edits]
    near(study(chain, loader, lesions, batch_budget=budget), study(chain, loader, lesions))


@settings(max_examples=15, deadline=None)
@given(recipes(max_blocks=5), EDITS, st.integers(9, 60))
def test_a_budget_for_chains_inside_branches(recipe, edits, budget):
    chain, loader = build(recipe), labelled(20)
    lesions = [lambda c, e=edit: edited(c, *e) for edit in edits]
    near(study(chain, loader, lesions, batch_budget=budget), study(chain, loader, lesions))


@pytest.mark.parametrize("budget", [1, 3, 8, 20, 64, 10_000])
def test_a_step_takes_at_most_the_budget(budget):
    chain = recorded(random_chain(STEADY))
    lesions = rp.random_deletions(chain, [1, 2, 3], 8, torch.Generator().manual_seed(0))
    near(study(chain, labelled(), lesions, batch_budget=budget), study(random_chain(STEADY), labelled(), lesions))
    sizes = sizes_in(chain)
    assert max(sizes) <= budget
    if budget >= 20:
        assert max(sizes) > 8  # some were stacked
        plain = recorded(random_chain(STEADY))
        study(plain, labelled(), lesions)
        assert len(sizes) < (0.5 if budget >= 64 else 0.9) * len(sizes_in(plain))
        assert sum(sizes) == sum(sizes_in(plain))  # as many examples in all


class Turned(nn.Module):
    """Maps of [place, batch, feature] that mix the places."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return torch.tanh(self.part(x)) + x.cumsum(0)


class Into(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("flat", [False, True])
def test_states_whose_batch_is_not_in_front_are_not_stacked(flat):
    places = 8  # as many as examples
    with seeded():
        turned = [Block(Turned(nn.Linear(3, 3)), nn.Identity(), in_shape=(-1, 3), out_shape=(-1, 3)) for _ in range(3)]
        plain = [Block(nn.Linear(5, 5), nn.Identity(), in_shape=(5,), out_shape=(5,)) for _ in range(3)]
        turn = Block(Into(lambda x: x[None, :, :3] * torch.arange(places)[:, None, None]), None, out_shape=(-1, 3))
        head = Into(lambda x: x.mean(0))
        if flat:  # both dimensions in one: places outside, examples inside
            turned = [Block(nn.Linear(3, 3), nn.Identity(), in_shape=(3,), out_shape=(3,)) for _ in range(3)]
            turn = Block(Into(lambda x: x[:, :3].repeat(places, 1) * torch.arange(places * len(x))[:, None]), None)
            head = Into(lambda x: x.view(places, -1, 3).mean(0))
        chain = ResidualChain(nn.Linear(5, 5), [*plain, turn, *turned], head).double().eval()
    for index, block in enumerate(chain):
        block.name = f"b{index}"
    lesions = [lambda c, s=s: rp.delete_blocks(c, s) for s in ([0], [1], [4], [0, 5], [1, 6], [2, 4])]
    loader = labelled(16)
    if flat:  # the counter makes each row depend on its place
        chains = [chain, *(lesion(chain) for lesion in lesions)]
        x = next(iter(loader))[0]
        with torch.inference_mode():
            found = dict(Trie(chains).logits(x, None, 64))
            for index, one in enumerate(chains):
                torch.testing.assert_close(found[index], one(x))
    near(study(chain, loader, lesions, batch_budget=64), study(chain, loader, lesions))


@pytest.mark.parametrize(("budget", "most"), [(None, 5), (None, 1), (64, 30), (64, 3), (6, 5)])
def test_when_memory_runs_out_the_budget_is_halved(budget, most):
    chain = recorded(random_chain(STEADY), most)
    frame = study(chain, labelled(), batch_budget=budget)
    near(frame, study(random_chain(STEADY), labelled()))
    too_large = [size for size in sizes_in(chain) if size > most]
    assert 1 <= len(too_large) <= 6  # once for each halving, not once a batch


def test_when_not_even_one_example_fits():
    with pytest.raises(rp.ResnetPathsError, match=r"batch_budget: got 1; allowed: a network that fits.*more memory"):
        study(recorded(random_chain(STEADY), 0), labelled())
    chain = recorded(random_chain(STEADY), 5)
    with pytest.raises(rp.ResnetPathsError, match=r"reestimate_batchnorm: got 'batches of up to 8 inputs'; .*smaller"):
        study(chain, labelled(), reestimate_batchnorm=[x for x, _ in labelled()])


@pytest.mark.parametrize("budget", [0, -1, 2.0, True, "8"])
def test_a_budget_is_a_number_of_examples(budget):
    with pytest.raises(rp.ResnetPathsError, match=r"batch_budget: got .*; allowed: an int of at least 1"):
        study(random_chain(STEADY), labelled(), batch_budget=budget)


# Counts


def test_counts_by_class():
    chain = random_chain(STEADY)
    x, y = inputs(30), torch.arange(30) // 10
    batches = [(x[:5], y[:5]), (x[5:15], y[5:15]), (x[25:], y[25:]), (x[15:25], y[15:25])]  # class 2 before class 1
    frame = study(chain, batches, per_class=True)
    plain = study(chain, batches)
    assert frame.drop(columns=["num_examples_per_class", "num_wrong_per_class"]).equals(plain)
    for row in frame.itertuples():
        wrong = one_by_one(rp.delete_block(chain, row.blocks[0]), batches)[0]
        truth = torch.cat([labels for _, labels in batches])
        assert row.num_examples_per_class == (10, 10, 10)
        assert row.num_wrong_per_class == tuple(int(wrong[truth == k].sum()) for k in range(3))


def test_losses_and_intervals_by_hand():
    chain, loader = random_chain(STEADY), labelled(50)
    frame = study(chain, loader)
    intact, _ = one_by_one(chain, loader)
    truth = torch.cat([y for _, y in loader])
    for row in frame.itertuples():
        lesioned = rp.delete_block(chain, row.blocks[0])
        with torch.inference_mode():
            logits = torch.cat([lesioned(x) for x, _ in loader])
        losses = -torch.log_softmax(logits, 1)[torch.arange(50), truth]
        assert row.cross_entropy == pytest.approx(losses.mean().item(), rel=1e-12)  # float64 stays float64
        wrong = (logits.argmax(1) != truth).double()
        p, z = wrong.mean().item(), stats.norm.ppf(0.975)
        middle, half = p + z**2 / 100, z * math.sqrt(p * (1 - p) / 50 + z**2 / (4 * 50**2))
        assert row.error_rate_low == pytest.approx((middle - half) / (1 + z**2 / 50), abs=1e-12)
        assert row.error_rate_high == pytest.approx((middle + half) / (1 + z**2 / 50), abs=1e-12)
        change = (wrong - intact.double()).numpy()
        bounds = (row.error_rate_increase_low, row.error_rate_increase_high)
        assert bounds == pytest.approx(score_bounds(change), abs=2e-6)


class Spoils(nn.Module):
    """Makes what some examples come to NaN or infinite: those whose first feature is above 0."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.where(x[:, :1] > 0, x + self.value, x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(value, tmp_path):
    chain, loader = random_chain(STEADY), labelled(40)
    spoilt = chain.with_blocks([chain[0].replace(post=Spoils(value)), *list(chain)[1:]])
    for options in ({}, {"store": tmp_path}, {"store": tmp_path}, {"batch_budget": 64}):
        frame = study(chain, loader, [lambda c: c, lambda c: spoilt], **options)
        with torch.inference_mode():
            finite = torch.cat([torch.isfinite(spoilt(x)).all(1) for x, _ in loader])
            right = torch.cat([spoilt(x).argmax(1) == y for x, y in loader])
        assert frame.num_not_finite.tolist() == [0, int((~finite).sum())]
        assert 0 < frame.num_not_finite[1] < 40
        assert frame.error_rate[1] == 1 - (right & finite).double().mean()
        assert math.isfinite(frame.cross_entropy[0])
        assert math.isnan(frame.cross_entropy[1])


class Certain(nn.Module):
    """Logits so far apart that a wrong one costs infinitely much."""

    def forward(self, x):
        return F.one_hot(torch.zeros(len(x), dtype=torch.int64), 3).double() * 1.7e308 - 8e307


def test_an_infinite_loss_survives_the_store(tmp_path):
    chain, loader = random_chain(STEADY), labelled(40)
    certain = chain.with_head(Certain())
    frames = [study(chain, loader, [lambda c: certain], store=s) for s in (None, tmp_path, tmp_path)]
    assert frames[0].cross_entropy.tolist() == [math.inf]
    assert frames[0].num_not_finite.tolist() == [0]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    pd.testing.assert_frame_equal(frames[0], frames[2])


@pytest.mark.parametrize("seed", [None, 0, 2**63 - 1, 2**63, 2**64 - 1])
def test_any_seed_of_a_generator_fits_the_frame(seed):
    frame = study(random_chain(STEADY), labelled(), [Lesion("delete", (), name="nothing", seed=seed)])
    assert frame.seed.isna()[0] if seed is None else int(frame.seed[0]) == seed
    drawn = torch.Generator().manual_seed(-1)
    frame = study(random_chain(STEADY), labelled(), rp.random_deletions(random_chain(STEADY), [1], 1, drawn))
    assert int(frame.seed[0]) == drawn.initial_seed()


# Re-estimated BatchNorm


def norm_chain():
    """A chain by hand with BatchNorm in stem, branches, a projection and after an addition."""
    with seeded():

        def branch(a, b):
            return nn.Sequential(
                nn.BatchNorm1d(a), nn.Tanh(), nn.Linear(a, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, b)
            )

        def block(i, a, b, **parts):
            return Block(
                branch(a, b), parts.pop("skip", nn.Identity()), name=f"b{i}", in_shape=(a,), out_shape=(b,), **parts
            )

        blocks = [
            block(0, 4, 4),
            block(1, 4, 4, post=nn.BatchNorm1d(4)),
            block(2, 4, 3, skip=nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), pre=nn.BatchNorm1d(4)),
            block(3, 3, 3),
            block(4, 3, 3),
        ]
        stem = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, eps=0.1))
        chain = ResidualChain(stem, blocks, nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))).double()
        for module in chain.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return chain.eval()


def reestimated(module, batches):
    """A copy of a module with BatchNorm statistics as torch takes them, averaged over batches."""
    module = copy.deepcopy(module)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for x in batches:
            module(x)
    return module.eval()


def statistics_batches():
    return [inputs(size, seed=size) for size in (20, 7, 33)]


@pytest.mark.parametrize("options", [{}, {"batch_budget": 3}, {"batch_budget": 64}])
def test_batchnorm_statistics_are_taken_again_for_each_lesion(options, tmp_path):
    chain, loader, batches = norm_chain(), labelled(60), statistics_batches()
    before = snapshot(chain)
    lesions = [
        *rp.single_deletions(chain),
        *rp.pair_deletions(chain)[-3:],
        lambda c: rp.swap_blocks(c, 3, 4),
        lambda c: c,
    ]
    frame = study(chain, loader, lesions, reestimate_batchnorm=batches, **options)
    assert_same(before, snapshot(chain))
    assert (frame.batchnorm_statistics == "re-estimated").all()
    for row, lesion in zip(frame.itertuples(), lesions, strict=True):
        alone = reestimated(lesion.edit(chain) if isinstance(lesion, Lesion) else lesion(chain), batches)
        wrong, _ = one_by_one(alone, loader)
        with torch.inference_mode():
            loss = sum(F.cross_entropy(alone(x), y, reduction="sum").item() for x, y in loader) / 60
        assert row.error_rate == wrong.double().mean()
        assert row.cross_entropy == pytest.approx(loss, rel=1e-10)
    # So is the intact chain, against which the increases are.
    assert (frame.intact_error_rate == frame.error_rate.iloc[-1]).all()
    assert frame.error_rate_increase.tolist() == pytest.approx((frame.error_rate - frame.intact_error_rate).tolist())
    plain = study(chain, loader, lesions)
    assert (plain.batchnorm_statistics == "intact").all()
    assert plain.intact_error_rate[0] != frame.intact_error_rate[0]
    assert not np.allclose(plain.cross_entropy, frame.cross_entropy, rtol=1e-3)
    # Batches of (inputs, labels), and a generator of them, will do.
    pairs = ((x, None) for x in (*batches, batches[0][:0]))  # batches without examples are left out
    again = study(chain, loader, lesions, reestimate_batchnorm=pairs, store=tmp_path, **options)
    assert again.equals(frame)


def test_batchnorm_statistics_of_exported_chains():
    plan = (
        3,
        tuple(
            Plan(width, skip, index % 2 == 0, index % 3 == 0)
            for index, (width, skip) in enumerate([
                (3, "identity"),
                (3, "identity"),
                (2, "projection"),
                (2, "identity"),
            ])
        ),
    )
    model, batches, loader = random_model(plan), statistics_batches(), labelled(60)
    chain = rp.unravel(model, inputs())
    before = snapshot(model)
    nothing = rp.Lesion("delete", (), name="nothing")
    frame = study(chain, loader, [*rp.single_deletions(chain), nothing], reestimate_batchnorm=batches)
    assert_same(before, snapshot(model))
    for row in frame.itertuples():
        edited_by_hand = copy.deepcopy(model)
        for index in row.blocks:
            nn.init.zeros_(edited_by_hand.blocks[index].fc2.weight)
            nn.init.zeros_(edited_by_hand.blocks[index].fc2.bias)
        alone = reestimated(edited_by_hand, batches)
        assert row.error_rate == one_by_one(alone, loader)[0].double().mean()
        with torch.inference_mode():
            loss = sum(F.cross_entropy(alone(x), y, reduction="sum").item() for x, y in loader) / 60
        assert row.cross_entropy == pytest.approx(loss, rel=1e-10)


def test_what_statistics_cannot_be_taken_from():
    none, empty = "got 'no tensors'", torch.zeros(0, 5, dtype=torch.float64)
    for batches, message in ((5, "got 5"), ([], none), ([1, 2], none), ([empty], none), (True, "got True")):
        with pytest.raises(rp.ResnetPathsError, match=f"reestimate_batchnorm: {message}; allowed: .*inputs"):
            study(norm_chain(), labelled(), reestimate_batchnorm=batches)

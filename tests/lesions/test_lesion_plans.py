"""Plans of lesions: what each edits, how random ones are drawn, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import resnet_paths as rp
from resnet_paths._utils.statistics import studentised_interval
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Parallel
from tests.chains import Plan, assert_same, inputs, random_chain, snapshot

STEADY = (3, tuple(Plan(3, "identity", False, False) for _ in range(6)))
STAGES = (
    3,
    tuple(
        Plan(w, s, False, False)
        for w, s in zip((3, 3, 3, 2, 2, 2, 2), ("identity",) * 3 + ("projection",) + ("identity",) * 3, strict=True)
    ),
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loader(n=40):
    generator = seeded(3)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(3, (n,), generator=generator)), batch_size=16)


def test_random_deletions_delete_what_they_say():
    chain = random_chain(STAGES)
    lesions = rp.random_deletions(chain, [1, 3, 7], 5, seeded())
    assert [len(lesion.blocks) for lesion in lesions] == [1] * 5 + [3] * 5 + [7] * 5
    for lesion in lesions:
        assert list(lesion.blocks) == sorted(set(lesion.blocks))
        assert [i for i, block in enumerate(lesion.edit(chain)) if block.branch is None] == list(lesion.blocks)
        assert lesion.kendall_tau == 1
    again = rp.random_deletions(chain, [1, 3, 7], 5, seeded())
    assert [lesion.blocks for lesion in again] == [lesion.blocks for lesion in lesions]


def test_random_deletions_are_uniform():
    drawn = Counter(lesion.blocks for lesion in rp.random_deletions(random_chain(STEADY), [2], 3000, seeded()))
    assert set(drawn) == set(itertools.combinations(range(6), 2))
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-4


def test_random_swaps_keep_stages_and_state_their_disorder():
    chain = random_chain(STAGES)
    lesions = rp.random_swaps(chain, range(1, 6), 8, seeded())
    assert len(lesions) == 40
    original = list(chain)
    for lesion in lesions:
        order = [original.index(block) for block in lesion.edit(chain)]
        assert order[3] == 3  # the block that changes the shape
        assert sorted(order[:3]) == [0, 1, 2]
        assert tuple(i for i, block in enumerate(order) if i != block) == lesion.blocks
        discordant = sum(a > b for a, b in itertools.combinations(order, 2))
        assert lesion.kendall_tau == pytest.approx(1 - 2 * discordant / math.comb(7, 2))
    assert all(lesion.kendall_tau < 1 for lesion in lesions[:8])


def test_random_swaps_are_uniform():
    drawn = Counter(lesion.blocks for lesion in rp.random_swaps(random_chain(STAGES), [1], 3000, seeded()))
    assert set(drawn) == {*itertools.combinations((0, 1, 2), 2), *itertools.combinations((4, 5, 6), 2)}
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-4


def test_pairs_and_their_interactions():
    chain = random_chain(STAGES)
    lesions = rp.pair_deletions(chain, [0, 2, "block5"])
    assert [lesion.blocks for lesion in lesions] == [(0,), (2,), (5,), (0, 2), (0, 5), (2, 5)]
    assert len(rp.pair_deletions(chain)) == 7 + 21
    frame = rp.lesion_study(chain, loader(), lesions, progress=False)
    found = rp.pair_interactions(frame)
    assert found[["first", "second"]].to_numpy().tolist() == [[0, 2], [0, 5], [2, 5]]
    increase = dict(zip(frame.blocks, frame.error_rate_increase, strict=True))
    for row in found.itertuples():
        expected = increase[row.first, row.second] - increase[row.first,] - increase[row.second,]
        assert row.interaction == pytest.approx(expected, abs=1e-15)


def test_intervals_of_interactions_are_over_examples():
    """Against Hall's interval written out, on a sample of differences of differences."""
    chain = random_chain(STAGES)
    for index in range(7):
        chain = rp.scale_block(chain, index, 1e-9 if index == 5 else 4.0)  # some pairs without any interaction
    frame = rp.lesion_study(chain, loader(43), rp.pair_deletions(chain), per_example=True, progress=False)
    found = rp.pair_interactions(frame)
    wrong = dict(zip(frame.blocks, frame.error_rate_per_example, strict=True))
    intact = frame.intact_error_rate_per_example.iloc[0]
    num_known = 0
    for row in found.itertuples():
        each = wrong[row.first, row.second] - wrong[row.first,] - wrong[row.second,] + intact
        assert row.interaction == pytest.approx(each.mean(), abs=1e-12)
        if each.std() == 0:
            assert math.isnan(row.interaction_low)
            continue
        num_known += 1
        n, a = len(each), stats.skew(each) / (3 * math.sqrt(len(each)))
        for end, quantile in ((row.interaction_low, 0.025), (row.interaction_high, 0.975)):
            t = (each.mean() - end) / stats.sem(each)
            assert t + a * t**2 + a**2 * t**3 / 3 + a / 2 == pytest.approx(stats.t.ppf(1 - quantile, n - 1), abs=1e-6)
    assert num_known > 5
    assert "interaction_low" not in rp.pair_interactions(frame.drop(columns="error_rate_influences"))


def test_interactions_of_a_study_that_stops():
    """The interval of differences of differences is that of the level at which lesions stopped; else it is refused."""
    chain, batches = random_chain(STAGES), [(x, y) for x, y in DataLoader(loader(480).dataset, batch_size=120)]
    for index in range(7):
        chain = rp.scale_block(chain, index, 4.0)

    def study(half_width):
        precision = rp.lesions.Precision(half_width)
        options = {"stop_when": precision, "per_example": True, "progress": False}
        return rp.lesion_study(chain, batches, rp.pair_deletions(chain), **options)

    frame = study(1.0)  # all stop at the first look
    assert frame.num_examples.unique().tolist() == [120]
    (level,) = frame.interval_level.unique()
    assert level > 0.95
    influences = dict(zip(frame.blocks, frame.error_rate_influences, strict=True))
    for row in rp.pair_interactions(frame).itertuples():
        each = influences[row.first, row.second] - influences[row.first,] - influences[row.second,]
        each = each + frame.intact_error_rate_influences[0]
        each[abs(each) < 1e-12] = 0
        expected = studentised_interval(row.interaction, each, level)[:2]
        assert (row.interaction_low, row.interaction_high) == pytest.approx(expected, nan_ok=True)
    frame = study(0.06)
    assert len(set(frame.num_examples)) > 1
    with pytest.raises(rp.ResnetPathsError, match=r"frame: got 'num_examples .*; allowed: a pair .*With stop_when"):
        rp.pair_interactions(frame)


def test_interactions_of_tokens_are_of_pooled_rates():
    """Texts of different lengths: against resampling of texts, and a mean of ratios by its linearization."""
    torch.manual_seed(0)
    blocks = [Block(nn.Linear(4, 4), nn.Identity(), name=f"b{i}", in_shape=(4,), out_shape=(4,)) for i in range(3)]
    chain = ResidualChain(nn.Embedding(7, 4), blocks, nn.Linear(4, 7)).eval()
    sizes = [1, 2, 40, 3, 1, 25, 60, 2, 9, 1, 3, 30, 4, 0, 12, 2]
    tokens = torch.randint(7, (len(sizes), max(sizes)))
    labels = torch.where(torch.arange(max(sizes)) < torch.tensor(sizes)[:, None], torch.randint(7, tokens.shape), -100)
    loader = [(tokens[i : i + 5], labels[i : i + 5]) for i in (0, 5, 10, 15)]
    frame = rp.lesion_study(chain, loader, rp.pair_deletions(chain), per_example=True, device="cpu", progress=False)
    known = labels != -100

    def wrong(*deleted):
        return ((rp.delete_blocks(chain, deleted)(tokens).argmax(2) != labels) & known).sum(1).double().numpy()

    n = known.sum(1).numpy()
    drawn = np.random.default_rng(0).multinomial(len(n), np.full(len(n), 1 / len(n)), 20_000)
    for row in rp.pair_interactions(frame).itertuples():
        sums = wrong(row.first, row.second) - wrong(row.first) - wrong(row.second) + wrong()
        assert row.interaction == pytest.approx(sums.sum() / n.sum(), abs=1e-12)
        influences = (sums - n * sums.sum() / n.sum())[n > 0] / n.sum()
        interval = studentised_interval(row.interaction, influences)
        assert (row.interaction_low, row.interaction_high) == pytest.approx(interval[:2], abs=1e-12)
        spread = (drawn @ sums / (drawn @ n)).std()
        assert np.sqrt((influences**2).sum()) == pytest.approx(spread, rel=0.25)


OPTIONS = {
    "duplicate": {},
    "duplicate_range": {},
    "scale": {"factor": 0.5},
    "replace": {"branch": torch.nn.Tanh()},
    "repeat": {},
    "parallel": {"loops": 2},
    "delete": {},
    "swap": {},
}


@pytest.mark.parametrize("runs", [(), ((0,), (1,))])
@pytest.mark.parametrize("kind", OPTIONS)
def test_positions_of_lesions_are_those_of_edits(kind, runs):
    """Negative ones count from the end, and there are no others."""
    chain, options = random_chain(STEADY), OPTIONS[kind] | {"runs": runs}
    by_hand = rp.Lesion(kind, (4, 5), **options).edit(chain)
    from_the_end = rp.Lesion(kind, (-2, -1), **options).edit(chain)
    assert torch.equal(from_the_end(inputs()), by_hand(inputs()))
    assert not torch.equal(from_the_end(inputs()), chain(inputs()))
    for blocks in ((5, 99), (5, -7)):
        with pytest.raises(rp.ResnetPathsError, match=f"block: got {blocks[1]}; allowed: a position from -6 to 5"):
            rp.Lesion(kind, blocks, **options).edit(chain)


def test_interactions_are_of_deletions_alone():
    chain = random_chain(STAGES)
    for index in range(7):
        chain = rp.scale_block(chain, index, 4.0)  # so that errors do not stay as they are
    pairs, others = rp.pair_deletions(chain), [*rp.duplications(chain), *rp.scalings(chain, [-9.0])]
    frame = rp.lesion_study(chain, loader(), [*pairs, *others, *pairs[:1], lambda c: c], progress=False)
    alone = frame[: len(pairs)]
    assert frame.error_rate_increase[len(pairs) :].abs().max() > 0
    assert rp.pair_interactions(frame).equals(rp.pair_interactions(alone))
    again = alone.assign(error_rate_increase=alone.error_rate_increase + 0.5)
    with pytest.raises(rp.ResnetPathsError, match=r"frame: got 'different effects of deleting 0'; .*rows of one study"):
        rp.pair_interactions(pd.concat([alone, again]))
    with pytest.raises(rp.ResnetPathsError, match=r"frame: got 'no single deletion of block 0'"):
        rp.pair_interactions(alone[1:])
    with pytest.raises(rp.ResnetPathsError, match=r"blocks'\]: got '\(0,\)'; allowed: tuples of positions"):
        rp.pair_interactions(alone.assign(blocks=alone.blocks.map(str)))


def test_lesions_say_of_what_kind_they_are():
    chain = random_chain(STAGES)
    plans = {
        "delete": [*rp.pair_deletions(chain), *rp.random_deletions(chain, [2], 1, seeded())],
        "duplicate": [*rp.duplications(chain), *rp.random_duplications(chain, [2], 1, seeded())],
        "duplicate_range": rp.range_repeats(chain, [1, 2]),
        "scale": rp.scalings(chain, [0.5]),
        "swap": rp.random_swaps(chain, [2], 1, seeded()),
        "replace": [*rp.branch_replacements(chain, chain), *rp.mean_replacements(chain, inputs())],
        "": [rp.Lesion("", (1,), name="mine", function=lambda c: c)],
    }
    for kind, plan in plans.items():
        assert {lesion.kind for lesion in plan} == {kind}
    assert [lesion.kind for lesion in rp.layer_schedules(chain, [4, 5, 6])] == [
        "delete",
        "repeat",
        "permute",
        "permute",
        "parallel",
        "parallel",
    ]


def test_of_a_function_nothing_but_its_effect_is_known():
    chain = random_chain(STEADY)
    lesions = [lambda c: rp.swap_blocks(c, 1, 4), rp.single_deletions(chain)[2]]
    frame = rp.lesion_study(chain, loader(), lesions, progress=False)
    assert frame.kind.tolist() == ["", "delete"]
    assert frame[["blocks", "num_blocks", "kendall_tau"]].isna().to_numpy().tolist() == [[True] * 3, [False] * 3]
    assert frame.loc[1, ["blocks", "num_blocks", "kendall_tau"]].tolist() == [(2,), 1, 1]
    for column, plot in (("num_blocks", rp.figures.plot_lesion_counts), ("kendall_tau", rp.figures.plot_reorderings)):
        with pytest.raises(rp.ResnetPathsError, match=rf"frame\['{column}'\]: got 'no value in 1 of 2 rows'"):
            plot(frame)


def test_a_study_of_nothing_has_its_columns():
    chain = random_chain(STEADY)
    empty = rp.lesion_study(chain, loader(), [], progress=False, per_class=True)
    full = rp.lesion_study(chain, loader(), rp.single_deletions(chain), progress=False, per_class=True)
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)
    assert len(rp.pair_interactions(empty)) == 0


def test_numbers_of_numpy_are_numbers():
    chain = random_chain(STAGES)
    for plan in (rp.random_deletions, rp.random_swaps, rp.random_duplications):
        one, other = (
            plan(chain, counts, repeats, seeded())
            for counts, repeats in ((np.arange(1, 3), np.int64(2)), (range(1, 3), 2))
        )
        assert [lesion.blocks for lesion in one] == [lesion.blocks for lesion in other]
        with pytest.raises(rp.ResnetPathsError, match=r"counts: got np.float64\(1.0\)"):
            plan(chain, np.ones(1), 1, seeded())
    for lesions in (rp.scalings(chain, np.float32([0.5])), rp.scalings(chain, np.array([2]))):
        assert isinstance(lesions[0].edit(chain)[0].branch.factors[0], float)
    batches = loader()
    stacked = rp.lesion_study(chain, batches, rp.single_deletions(chain), batch_budget=np.int64(32), progress=False)
    assert stacked.equals(rp.lesion_study(chain, batches, rp.single_deletions(chain), batch_budget=32, progress=False))


def test_scalings_and_duplications():
    chain = random_chain(STAGES)
    names = [lesion.name for lesion in rp.scalings(chain, [0.5, 2])]
    assert names[:3] == ["0.5 x block0", "2 x block0", "0.5 x block1"]
    assert len(names) == 14
    zero = rp.scalings(chain, [0.0])[1].edit(chain)
    with torch.no_grad():
        torch.testing.assert_close(zero(inputs()), rp.delete_block(chain, 1)(inputs()))
    doubled = rp.duplications(chain)
    assert [lesion.blocks for lesion in doubled] == [(i,) for i in range(7) if i != 3]
    assert len(doubled[0].edit(chain)) == 8


def test_layer_schedules_by_hand():
    chain = random_chain(STEADY)
    skip, repeat, reverse, shuffled, parallel, looped = rp.layer_schedules(chain, loops=2, generator=seeded(1))
    assert {lesion.blocks for lesion in (skip, repeat, reverse, parallel, looped)} == {(1, 2, 3, 4)}
    blocks, x = list(chain), inputs()

    def run(*order):
        state = chain.stem(x)
        for index in order:
            state = blocks[index](state)
        return chain.head(state)

    def average(state):
        return sum(blocks[i](state) for i in (1, 2, 3, 4)) / 4

    with torch.no_grad():
        torch.testing.assert_close(skip.edit(chain)(x), run(0, 5))
        torch.testing.assert_close(repeat.edit(chain)(x), run(0, 3, 3, 3, 3, 5))
        torch.testing.assert_close(reverse.edit(chain)(x), run(0, 4, 3, 2, 1, 5))
        state = blocks[0](chain.stem(x))
        torch.testing.assert_close(parallel.edit(chain)(x), chain.head(blocks[5](average(state))))
        torch.testing.assert_close(looped.edit(chain)(x), chain.head(blocks[5](average(average(state)))))
        order = [blocks.index(block) for block in shuffled.edit(chain)]
        torch.testing.assert_close(shuffled.edit(chain)(x), run(*order))
    assert sorted(order) == list(range(6))
    assert order[0] == 0
    assert order[5] == 5
    assert reverse.kendall_tau == pytest.approx(1 - 2 * 6 / 15)
    assert any(isinstance(block.branch, Parallel) for block in parallel.edit(chain))


def branch_outputs(chain, x):
    """What each block's branch returns for `x`, of copies, block by block."""
    outputs, state = [], chain.stem(x.clone())
    for block in chain:
        outputs.append(None if block.branch is None else block.branch(block.pre(state.clone())))
        state = block(state)
    return outputs


@torch.no_grad()
def test_branches_replaced_by_their_means():
    chain, x = rp.delete_block(random_chain(STAGES), 5), inputs(20)
    before = snapshot(chain)
    lesions = rp.mean_replacements(chain, x)
    assert_same(before, snapshot(chain))
    assert [lesion.blocks for lesion in lesions] == [(i,) for i in range(7) if i != 5]
    assert [lesion.name for lesion in lesions][:2] == ["mean of block0", "mean of block1"]
    outputs, other = branch_outputs(chain, x), inputs(6, seed=9)
    for lesion in lesions:
        (index,), lesioned = lesion.blocks, lesion.edit(chain)
        assert [b.branch is c.branch for b, c in zip(lesioned, chain, strict=True)].count(False) == 1
        state = chain.stem(other)
        for place, block in enumerate(chain):
            if place == index:
                state = block.post(block.skip(block.pre(state)) + outputs[index].mean(0))
            else:
                state = block(state)
        torch.testing.assert_close(lesioned(other), chain.head(state))
    frame = rp.lesion_study(chain, loader(), lesions, progress=False)
    assert frame.lesion.tolist() == [lesion.name for lesion in lesions]


@torch.no_grad()
def test_means_of_parts_in_place():
    plain = random_chain(STEADY)
    spoiling = ResidualChain(
        torch.nn.Sequential(torch.nn.ReLU(inplace=True), plain.stem),
        [b.replace(branch=torch.nn.Sequential(torch.nn.ReLU(inplace=True), b.branch)) for b in plain],
        plain.head,
    ).eval()
    x = inputs(20)
    lesions = rp.mean_replacements(spoiling, x)
    assert torch.equal(x, inputs(20))
    for lesion, output in zip(lesions, branch_outputs(spoiling, x), strict=True):
        assert torch.equal(lesion.edit(spoiling)[lesion.blocks[0]].branch.value, output.mean(0))

    def keep():
        return torch.nn.Identity()

    with pytest.raises(rp.ResnetPathsError, match=r"inputs: got 'no examples'; allowed: at least one"):
        rp.mean_replacements(plain, x[:0])
    inner = ResidualChain(keep(), list(plain)[:3], keep()).eval()
    outer = plain.with_blocks([plain[0].replace(branch=inner), *list(plain)[1:]])
    [first, *_] = rp.mean_replacements(outer, x)
    torch.testing.assert_close(first.edit(outer)[0].branch.value, inner(plain.stem(x)).mean(0))


@torch.no_grad()
def test_branches_replaced_by_those_of_another_chain():
    chain, source = random_chain(STAGES), rp.delete_block(random_chain(STAGES, seed=5), 2)
    lesions = rp.branch_replacements(chain, source, "re-initialise")
    assert [lesion.blocks for lesion in lesions] == [(i,) for i in range(7) if i != 2]
    assert lesions[2].name == "re-initialise block3"
    for lesion in lesions:
        (index,), lesioned = lesion.blocks, lesion.edit(chain)
        assert lesioned[index].branch is source[index].branch
        assert lesioned[index].skip is chain[index].skip
        by_hand = chain.with_blocks([*list(chain)[:index], lesioned[index], *list(chain)[index + 1 :]])
        assert torch.equal(lesioned(inputs()), by_hand(inputs()))
    own = rp.branch_replacements(chain, chain)
    assert [lesion.name for lesion in own][:1] == ["replace block0"]
    frame = rp.lesion_study(chain, loader(), [*own, *lesions], progress=False)
    assert frame.error_rate_increase[:7].tolist() == [0] * 7
    assert frame.attrs["block_evaluations"] == 7 + sum(7 - index for index in (0, 1, 3, 4, 5, 6))
    with pytest.raises(
        rp.ResnetPathsError, match=r"source: got '6 blocks'; allowed: a chain of 7 blocks with the shapes"
    ):
        rp.branch_replacements(chain, random_chain(STEADY))
    for argument, pair in (("source", (chain, torch.nn.Linear(2, 2))), ("chain", (torch.nn.Linear(2, 2), chain))):
        with pytest.raises(rp.ResnetPathsError, match=rf"^{argument}: got 'Linear'; allowed: a ResidualChain"):
            rp.branch_replacements(*pair)


def test_lesions_name_the_seed_that_drew_them():
    chain = random_chain(STAGES)
    drawn = [
        *rp.random_deletions(chain, [2], 2, seeded(7)),
        *rp.random_swaps(chain, [1], 2, seeded(8)),
        rp.layer_schedules(chain, [4, 5], generator=seeded(9))[3],
        rp.layer_schedules(chain, [4, 5])[3],
    ]
    assert [lesion.seed for lesion in drawn] == [7, 7, 8, 8, 9, 0]
    planned = [*rp.single_deletions(chain), *rp.duplications(chain), *rp.layer_schedules(chain, [4, 5])[:3]]
    assert {lesion.seed for lesion in planned} == {None}
    frame = rp.lesion_study(chain, loader(), [*drawn, planned[0]], progress=False)
    assert frame.seed[:6].tolist() == [7, 7, 8, 8, 9, 0]
    assert frame.seed.isna().tolist() == [False] * 6 + [True]
    large = 2**60 + 1  # no float
    mixed = [rp.random_deletions(chain, [1], 1, seeded(large))[0], planned[0]]
    assert rp.lesion_study(chain, loader(), mixed, progress=False).seed[0] == large
    state = torch.random.get_rng_state()
    rp.layer_schedules(chain, [4, 5])
    rp.random_swaps(chain, [3], 2, seeded(8))
    assert torch.equal(torch.random.get_rng_state(), state)  # none of it is drawn from the global generator


def test_means_of_a_chain_in_training_mode_are_refused():
    chain = random_chain(STEADY)
    chain = chain.with_head(torch.nn.Sequential(torch.nn.BatchNorm1d(3).double(), chain.head))
    with pytest.raises(rp.ResnetPathsError, match=r"BatchNorm1d 'head.0' in training mode"):
        rp.mean_replacements(chain, inputs())
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got 'Linear'"):
        rp.mean_replacements(torch.nn.Linear(2, 2), inputs())


def test_a_study_of_all_kinds_has_one_frame():
    chain = random_chain(STAGES)
    lesions = [
        *rp.single_deletions(chain),
        *rp.random_deletions(chain, [2], 2, seeded()),
        *rp.random_swaps(chain, [3], 2, seeded()),
        *rp.duplications(chain),
        *rp.scalings(chain, [0.1]),
        *rp.layer_schedules(chain, [4, 5, 6]),
    ]
    frame = rp.lesion_study(chain, loader(), lesions, progress=False)
    assert frame.lesion.tolist() == [lesion.name for lesion in lesions]
    assert frame.kendall_tau.tolist() == [lesion.kendall_tau for lesion in lesions]
    assert frame.attrs["block_evaluations"] < frame.attrs["block_evaluations_naive"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: rp.random_deletions(c, [8], 1, seeded()),
            r"counts: got 8; allowed: numbers of blocks that can be deleted from 1 to 7",
        ),
        (lambda c: rp.random_deletions(c, [0], 1, seeded()), r"counts: got 0"),
        (lambda c: rp.random_swaps(c, [1], -1, seeded()), r"repeats: got -1"),
        (lambda c: rp.random_swaps(random_chain((3, STAGES[1][3:4])), [1], 1, seeded()), r"two blocks of one stage"),
        (lambda c: rp.pair_deletions(c, ["block9"]), r"block: got 'block9'"),
        (lambda c: rp.layer_schedules(c, [0, 2]), r"blocks: .*neighbouring"),
        (lambda c: rp.layer_schedules(c, [2, 3]), r"blocks: .*identity skips"),
        (lambda c: rp.single_deletions(torch.nn.Linear(2, 2)), r"chain: got 'Linear'; .*unravel"),
        (lambda c: rp.pair_interactions(rp.path_histogram(2)), r"frame: .*lesion_study"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        call(random_chain(STAGES))


def test_a_frame_has_scalar_columns_of_blocks():
    chain = random_chain(STEADY)
    lesions = [
        *rp.scalings(chain, [0.5])[:2],
        rp.Lesion("swap", (2, 3), name="swap 2 and 3"),
        rp.Lesion("delete", (), name="nothing"),
        lambda c: c,
    ]
    frame = rp.lesion_study(chain, loader(), lesions, progress=False)
    assert frame.block_index[:3].tolist() == [0, 1, 2]
    assert frame.block_index[3:].isna().all()
    assert frame.block.tolist()[:3] == ["block0", "block1", "block2"]
    assert frame.block[3:].isna().all()
    assert frame.factor[:2].tolist() == [0.5, 0.5]
    assert frame.factor[2:].isna().all()
    assert frame.num_blocks[:4].tolist() == [1, 1, 2, 0]
    assert frame.kendall_tau.isna().tolist() == [False, False, True, False, True]
    single = rp.lesion_study(chain, loader(), rp.single_deletions(chain), progress=False)
    assert single.block_index.dtype == np.int64
    rp.figures.plot_single_deletions(single, plt.figure().gca())
    plt.close("all")


def test_lesions_are_values():
    chain = random_chain(STEADY)
    one, other = rp.single_deletions(chain)[1], rp.Lesion("delete", (1,), name="delete block1")
    assert one == other
    assert hash(one) == hash(other)
    assert one != rp.Lesion("delete", (2,), name="delete block1")
    swapped = rp.Lesion("swap", (1, 4)).edit(chain)
    assert [block.name for block in swapped] == [f"block{i}" for i in (0, 4, 2, 3, 1, 5)]
    bad = {
        "kind": ({"kind": "remove"}, "got 'remove'; allowed: one of 'delete', 'duplicate'"),
        "factor": ({"kind": "scale", "blocks": (1,)}, "got None; allowed: the factor"),
        "order": ({"kind": "permute", "blocks": (1,)}, "got None; allowed: the order"),
        "function": ({"kind": ""}, "got None; allowed: the function"),
        "blocks": ({"kind": "swap", "blocks": (1,)}, "allowed: two positions to swap"),
    }
    for argument, (fields, message) in bad.items():
        with pytest.raises(rp.ResnetPathsError, match=f"^{argument}: .*{message}"):
            rp.Lesion(**fields)
    with pytest.raises(rp.ResnetPathsError, match=r"^blocks: got None; allowed: a tuple of positions"):
        rp.Lesion("delete")

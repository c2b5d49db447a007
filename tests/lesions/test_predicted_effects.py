"""Cheap scores of every block against finite differences and statistics by hand, and their rank correlations."""

from __future__ import annotations

import copy
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from scipy import stats
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.lesions import score_correlations
from resnet_paths.lesions.predicted import SCORES as LABEL_FREE
from resnet_paths.lesions.predicted import _interval_of_correlation
from tests.chains import Plan, assert_same, inputs, plans, random_chain, random_model, snapshot
from tests.gradients.gradient_reference import build, recipes, seeded
from tests.lesions.test_lesion_options import study
from tests.lesions.test_lesions import STEADY, labelled

SCORES = ("first_order_cross_entropy_increase", *LABEL_FREE)


def effects(chain, loader, **options):
    return rp.predicted_effects(chain, loader, progress=False, **options)


class Between(nn.Module):
    """A plain block's branch on its way to the identity."""

    def __init__(self, branch, step):
        super().__init__()
        self.branch, self.step = branch, step

    def forward(self, x):
        return (1 - self.step) * self.branch(x) + self.step * x


def weakened(chain, index, step):
    """The chain with a block's sum moved by `step` towards what would be there without its branch."""
    block = chain[index]
    if block.skip is not None:
        return rp.scale_block(chain, index, 1 - step)
    return chain.with_blocks(
        b.replace(branch=Between(b.branch, step)) if i == index else b for i, b in enumerate(chain)
    )


def losses(chain, batches):
    with torch.no_grad():
        return torch.cat([F.cross_entropy(chain(x), y, reduction="none") for x, y in batches])


def by_hand(chain, batches, index):
    """The four scores of one block for each example; None if it cannot be deleted."""
    block = chain[index]
    if block.skip is None and not block.keeps_shape:
        return None
    step = 1e-5
    first_order = torch.zeros(sum(len(y) for _, y in batches)).double()
    if block.branch is not None:
        ends = [losses(weakened(chain, index, s), batches) for s in (step, -step)]
        first_order = (ends[0] - ends[1]) / (2 * step)
    with torch.no_grad():
        state = torch.cat([chain.stem(x) for x, _ in batches])
        for before in list(chain)[:index]:
            state = before(state)
        shared = block.pre(state)
        without = shared if block.skip is None else block.skip(shared)
        total = without if block.branch is None else block.branch(shared)
        if block.skip is not None and block.branch is not None:
            total = total + without
        one, other = (block.post(s).flatten(1).numpy() for s in (without, total))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosine = np.divide((one * other).sum(1), lengths, out=np.zeros(len(one)), where=lengths > 0)
    cosine[~one.any(1) & ~other.any(1)] = 1  # a state of 0 that stays 0
    norms = [np.linalg.norm(s.flatten(1).numpy(), axis=1) for s in (total - without, without)]
    return {
        "first_order_cross_entropy_increase": first_order.numpy(),
        "block_influence": 1 - cosine,
        "angular_distance": np.arccos(np.clip(cosine, -1, 1)) / math.pi,
        "relative_branch_norm": np.where(norms[0] == 0, 0, norms[0] / norms[1]),
    }


def assert_by_hand(chain, loader):
    before = snapshot(chain)
    frame = effects(chain, loader)
    assert_same(before, snapshot(chain))
    batches = list(loader)
    assert frame.block_index.tolist() == list(range(len(chain)))
    assert frame.block.tolist() == [block.name for block in chain]
    for row in frame.to_dict("records"):
        assert row["num_examples"] == sum(len(y) for _, y in batches)
        expected = by_hand(chain, batches, row["block_index"])
        for score in SCORES:
            if expected is None:
                assert math.isnan(row[score])
                assert math.isnan(row[f"{score}_se"])
                continue
            values = expected[score]
            # An angle of almost 0 is the root of a rounding error.
            near = {"rel": 1e-6, "abs": 1e-6 if score == "angular_distance" else 1e-8}
            assert row[score] == pytest.approx(values.mean(), **near), score
            assert row[f"{score}_se"] == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), **near), score


@settings(max_examples=25, deadline=None)
@given(plans(max_blocks=5))
def test_scores_of_any_chain(plan):
    chain, loader = random_chain(plan), labelled(20)
    assert_by_hand(chain, loader)
    deletable = [i for i, b in enumerate(chain) if b.skip is not None or b.keeps_shape]
    if deletable:
        assert_by_hand(rp.delete_block(chain, deletable[-1]), loader)


@settings(max_examples=15, deadline=None)
@given(recipes(max_blocks=4))
def test_scores_of_chains_inside_branches(blocks):
    chain = build(blocks)
    assert_by_hand(chain, labelled(20))


def test_scores_of_an_exported_chain():
    model = random_model((3, tuple(Plan(3, "identity", i % 2 == 0, False) for i in range(3))))
    assert_by_hand(rp.unravel(model, inputs()), labelled(20))


def test_tiny_linear_branches_are_predicted_to_second_order():
    def at(scale):
        chain = random_chain(STEADY)
        with seeded(5):
            tiny = [nn.Linear(3, 3).double() for _ in chain]
        with torch.no_grad():
            for layer in tiny:
                layer.weight *= scale
                layer.bias *= scale
        chain = chain.with_blocks(b.replace(branch=t) for b, t in zip(chain, tiny, strict=True))
        frame = study(chain, labelled(60))
        measured = frame.cross_entropy - losses(chain, labelled(60)).mean().item()
        return measured.to_numpy(), effects(chain, labelled(60)).first_order_cross_entropy_increase.to_numpy()

    errors = []
    for scale in (1e-2, 5e-3):
        measured, predicted = at(scale)
        errors.append(np.abs(measured - predicted))
        assert (errors[-1] < 0.05 * np.abs(measured).max()).all()
    assert np.allclose(errors[0] / errors[1], 4, rtol=0.1)


def test_a_single_example_has_no_standard_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = effects(random_chain(STEADY), labelled(1))
    assert frame[[f"{score}_se" for score in SCORES]].isna().to_numpy().all()
    assert frame[list(SCORES)].notna().to_numpy().all()


def tokens(size=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 4, 5, generator=generator).double(), torch.arange(size) % 3


def test_cosines_and_norms_over_one_dimension():
    with seeded():
        branches = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(3)]
        blocks = [Block(branch, nn.Identity(), name=f"b{i}") for i, branch in enumerate(branches)]
        chain = ResidualChain(nn.Linear(5, 3), blocks, nn.Sequential(nn.Flatten(), nn.Linear(12, 3))).double().eval()
    x, y = tokens()
    with torch.no_grad():
        state = chain[0](chain.stem(x))
        skip, total = state, chain[1](state)
        for dim in (1, 2):
            frame = effects(chain, [(x, y)], feature_dim=dim)
            again = effects(chain, [(x, y)], feature_dim=dim - 3)
            assert frame.equals(again)
            cosine = (skip * total).sum(dim) / skip.norm(dim=dim) / total.norm(dim=dim)
            each = {
                "block_influence": 1 - cosine,
                "angular_distance": cosine.acos() / math.pi,
                "relative_branch_norm": (total - skip).norm(dim=dim) / skip.norm(dim=dim),
            }
            for score, values in each.items():
                means = values.mean(1)  # of an example, over all places
                assert frame[score][1] == pytest.approx(means.mean().item(), rel=1e-9)
                assert frame[f"{score}_se"][1] == pytest.approx(means.std().item() / math.sqrt(6), rel=1e-9)
        assert frame.first_order_cross_entropy_increase.equals(
            effects(chain, [(x, y)]).first_order_cross_entropy_increase
        )
    flat = effects(random_chain(STEADY), labelled(), feature_dim=-1)
    pd.testing.assert_frame_equal(flat, effects(random_chain(STEADY), labelled()))
    for dim in (0, -3, 3, -4, 17):
        with pytest.raises(
            rp.ResnetPathsError, match=rf"feature_dim: got {dim}; allowed: None, or a dimension.* 1 to 2"
        ):
            effects(chain, [(x, y)], feature_dim=dim)


class AddsInPlace(nn.Module):
    def __init__(self, layer, in_place):
        super().__init__()
        self.layer, self.in_place = layer, in_place

    def forward(self, x):
        x = x.add_(0.5) if self.in_place else x + 0.5
        return self.layer(x)


@pytest.mark.parametrize("where", ["stem", "pre", "post", "skip", "branch", "head"])
def test_parts_that_work_in_place(where):
    """As if the part worked on a copy; a branch in place changes what the intact network's skip carries on."""
    frames = []
    loader = [(x.clone(), y) for x, y in labelled(20)]
    for in_place in (False, True):
        chain = copy.deepcopy(random_chain(STEADY))
        relu = nn.ReLU(inplace=in_place)
        if where == "stem":
            chain = ResidualChain(AddsInPlace(chain.stem, in_place), chain, chain.head).eval()
        elif where == "head":
            chain = chain.with_head(nn.Sequential(nn.ReLU(inplace=in_place), chain.head))
        elif where == "branch":
            skip = nn.Identity() if in_place else AddsInPlace(nn.Identity(), False)
            chain = chain.with_blocks(
                b.replace(branch=AddsInPlace(b.branch, in_place), skip=skip, skip_kind="identity") for b in chain
            )
        else:
            part = nn.Sequential(relu) if where == "skip" else relu
            branch = {"branch": nn.Sequential(nn.Tanh(), chain[1].branch)} if where == "skip" else {}
            chain = chain.with_blocks([chain[0], chain[1].replace(**{where: part}, **branch), *list(chain)[2:]])
        frames.append(effects(chain, loader))
    assert all(torch.equal(x, kept) for (x, _), (kept, _) in zip(loader, labelled(20), strict=True))
    if where in ("skip", "branch"):  # the branch, or its deletion, is not what it is out of place
        assert frames[1][list(SCORES)].notna().to_numpy().all()
    else:
        pd.testing.assert_frame_equal(*frames)


def test_without_its_branch_a_block_sees_its_input_as_it_was():
    """A branch that begins in place takes its change along when it is deleted."""
    chain = random_chain(STEADY)
    chain = chain.with_blocks(b.replace(branch=AddsInPlace(b.branch, True)) for b in chain)
    x, y = next(iter(labelled(8)))
    frame = effects(chain, [(x.clone(), y)])
    with torch.no_grad():
        state = chain.stem(x)
        for row, block in zip(frame.itertuples(), chain, strict=True):
            total = block(state.clone())
            norm = ((total - state).norm(dim=1) / state.norm(dim=1)).mean()
            assert row.relative_branch_norm == pytest.approx(norm.item(), rel=1e-9)
            state = total


def test_whatever_gradients_are_asked_for_around_it():
    chain, loader = random_chain(STEADY), list(labelled(20))
    plain = effects(chain, loader)
    with torch.no_grad():
        pd.testing.assert_frame_equal(effects(chain, loader), plain)
    with torch.inference_mode():
        inside = [(x.clone(), y.clone()) for x, y in loader]
        pd.testing.assert_frame_equal(effects(chain, inside), plain)
    assert inside[0][0].is_inference()
    frozen = copy.deepcopy(chain).requires_grad_(False)
    pd.testing.assert_frame_equal(effects(frozen, loader), plain)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.grad is None for p in chain.parameters())
    # Nothing stands before the first sum: the user's own images are not marked.
    bare = ResidualChain(nn.Identity(), [rp.delete_block(chain, 0)[0]], nn.Linear(5, 3).double()).eval()
    assert effects(bare, loader).relative_branch_norm.tolist() == [0]
    assert not any(x.requires_grad for x, _ in loader)
    half = effects(copy.deepcopy(chain).bfloat16(), [(x.bfloat16(), y) for x, y in loader])
    assert np.allclose(half.relative_branch_norm, plain.relative_branch_norm, rtol=0.1)


def test_what_cannot_be_scored():
    chain = random_chain(STEADY)
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got 'Linear'; allowed: a ResidualChain"):
        effects(nn.Linear(2, 2), labelled())
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got \"?'?BatchNorm1d.*in training mode"):
        effects(chain.with_head(nn.Sequential(nn.BatchNorm1d(3).double(), chain.head)), labelled())


# Rank correlations


def test_correlations_are_scipys():
    chain, loader = random_chain((3, tuple(Plan(3, "identity", i % 2 == 1, False) for i in range(8)))), labelled(200)
    for index in range(8):
        chain = rp.scale_block(chain, index, 4.0)  # so that errors do not stay as they are
    predicted = effects(chain, loader)
    lesions = [*rp.duplications(chain), *rp.pair_deletions(chain)[::-1], *rp.single_deletions(chain)[:2]]
    frame = study(chain, loader, lesions)
    found = score_correlations(predicted, frame)
    assert [(row.score, row.effect) for row in found.itertuples()] == [
        (score, effect) for score in SCORES for effect in ("error_rate_increase", "cross_entropy")
    ]
    single = study(chain, loader)
    for row in found.itertuples():
        x, y = predicted[row.score], single[row.effect]
        assert (row.spearman, row.spearman_p) == pytest.approx(tuple(stats.spearmanr(x, y)), abs=1e-12)
        assert (row.kendall, row.kendall_p) == pytest.approx(tuple(stats.kendalltau(x, y)), abs=1e-12)
        assert row.num_blocks == 8
        assert -1 <= row.spearman_low < row.spearman < row.spearman_high <= 1


@pytest.mark.slow
def test_intervals_of_correlations_cover_them():
    """Of 54 pairs, as many as blocks of a ResNet-110, from a normal distribution whose rank correlation is known."""
    generator, normal_correlation = np.random.default_rng(0), 0.6
    true = 6 / math.pi * math.asin(normal_correlation / 2)
    covered = []
    for _ in range(2_000):
        x, y = generator.multivariate_normal([0, 0], [[1, normal_correlation], [normal_correlation, 1]], 54).T
        low, high = _interval_of_correlation(stats.spearmanr(x, y).statistic, 54)
        covered.append(low <= true <= high)
    assert 0.935 < np.mean(covered) < 0.965
    assert _interval_of_correlation(0.28, 54) == pytest.approx((0.01, 0.51), abs=0.01)
    assert all(math.isnan(end) for end in _interval_of_correlation(1.0, 54) + _interval_of_correlation(0.5, 3))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_cosines_do_not_depend_on_the_size_of_the_states(size):
    with seeded():
        linear = [nn.Linear(3, 3, bias=False) for _ in range(2)]
        blocks = [Block(branch, nn.Identity(), name=f"b{i}") for i, branch in enumerate(linear)]
        chain = ResidualChain(nn.Linear(5, 3, bias=False), blocks, nn.Linear(3, 3)).double().eval()
    chain.stem.weight.data.mul_(size)
    x = torch.cat([inputs(), torch.zeros(1, 5, dtype=torch.float64)])
    frame = effects(chain, [(x, torch.zeros(5, dtype=torch.long))])
    states = chain.stem(x).detach().numpy() / size
    for row, branch in zip(frame.itertuples(), linear, strict=True):
        after = states + states @ branch.weight.detach().numpy().T
        lengths = np.linalg.norm(states[:4], axis=1) * np.linalg.norm(after[:4], axis=1)
        cosine = np.append((states * after).sum(1)[:4] / lengths, 1)  # a state of 0 stays 0
        assert row.block_influence == pytest.approx((1 - cosine).mean(), rel=1e-9)
        assert row.angular_distance == pytest.approx((np.arccos(cosine) / math.pi).mean(), rel=1e-9)
        states = after


def test_correlations_leave_out_what_cannot_be_deleted():
    kinds = [(3, "identity"), (2, "none"), (2, "identity"), (2, "none"), (2, "identity")]
    chain = random_chain((3, tuple(Plan(width, skip, False, False) for width, skip in kinds)))
    predicted, frame = effects(chain, labelled()), study(chain, labelled())
    assert predicted.block_influence.isna().tolist() == [False, True, False, False, False]
    assert (score_correlations(predicted, frame).num_blocks == 4).all()


def test_what_cannot_be_correlated():
    chain = random_chain(STEADY)
    predicted, frame = effects(chain, labelled()), study(chain, labelled())
    with pytest.raises(rp.ResnetPathsError, match=r"predicted: got .*; allowed: a frame of predicted_effects"):
        score_correlations(frame, frame)
    with pytest.raises(rp.ResnetPathsError, match=r"study: .*lesion_study.*Missing: kind, error"):
        score_correlations(predicted, predicted)
    with pytest.raises(
        rp.ResnetPathsError, match=r"2 single deletions in both frames.*at least three.*single_deletions"
    ):
        score_correlations(predicted, frame[:2])
    with pytest.raises(rp.ResnetPathsError, match=r"0 single deletions in both frames"):
        score_correlations(predicted, study(chain, labelled(), rp.duplications(chain)))
    two = pd.concat([frame, frame.assign(cross_entropy=frame.cross_entropy + 1)])
    with pytest.raises(rp.ResnetPathsError, match=r"study: got 'different effects of deleting 0'; .*one study"):
        score_correlations(predicted, two)


def test_effects_are_drawn_of_deletions_alone():
    chain = random_chain(STEADY)
    predicted = effects(chain, labelled())
    frame = study(chain, labelled(), [*rp.scalings(chain, [0.5, -1.0]), *rp.single_deletions(chain), lambda c: c])
    ax = rp.figures.plot_predicted_effects(
        predicted, frame, "block_influence", plt.figure().gca(), effect="cross_entropy"
    )
    assert ax.containers[0].lines[0].get_ydata().tolist() == study(chain, labelled()).cross_entropy.tolist()
    plt.close(ax.figure)
    with pytest.raises(rp.ResnetPathsError, match=r"study: got .*Missing: kind, error"):
        rp.figures.plot_predicted_effects(predicted, predicted, "block_influence")

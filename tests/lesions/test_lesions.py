"""Lesion studies, against a loop that runs each lesioned network on its own."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import resnet_paths as rp
from resnet_paths.core.chain import ResidualChain
from resnet_paths.lesions.lesion import Lesion
from tests.chains import Plan, assert_same, plans, random_chain, snapshot
from tests.utils.test_statistics import score_bounds

STEADY = (3, tuple(Plan(3, "identity", False, False) for _ in range(6)))


def labelled(n=37, seed=0, batch_size=8, **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(3, (n,), generator=generator)), batch_size=batch_size, **options)


def one_by_one(chain, loader):
    """Wrong or right an image, and the losses, by running the network on its own."""
    with torch.inference_mode():
        pairs = [(chain(x), y) for x, y in loader]
    wrong = torch.cat([logits.argmax(1) != y for logits, y in pairs])
    return wrong, torch.cat([F.cross_entropy(logits.float(), y, reduction="none") for logits, y in pairs])


def edits():
    pick = st.integers(0, 4)
    return st.one_of(
        pick.map(lambda i: lambda c: rp.delete_block(c, i)),
        st.sets(pick, min_size=1).map(lambda s: lambda c: rp.delete_blocks(c, s)),
        st.tuples(pick, pick).map(lambda p: lambda c: rp.swap_blocks(c, *p)),
        pick.map(lambda i: lambda c: rp.duplicate_block(c, i)),
        st.tuples(pick, st.sampled_from([0.5, -1.0])).map(lambda p: lambda c: rp.scale_block(c, *p)),
        pick.map(lambda i: lambda c: rp.parallel_blocks(c, [i, i + 1])),
        st.just(lambda c: c),
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(edits(), min_size=1, max_size=8))
def test_the_same_numbers_as_one_by_one(lesions):
    chain, loader = random_chain(STEADY), labelled()
    before = snapshot(chain)
    frame = rp.lesion_study(chain, loader, lesions, progress=False)
    assert_same(before, snapshot(chain))
    intact, _ = one_by_one(chain, loader)
    for row, edit in zip(frame.itertuples(), lesions, strict=True):
        wrong, losses = one_by_one(edit(chain), loader)
        assert row.error_rate == wrong.double().mean().item()
        assert row.cross_entropy == pytest.approx(losses.double().mean().item(), rel=1e-6)
        assert row.intact_error_rate == intact.double().mean().item()
        low, high = stats.binomtest(int(wrong.sum()), 37).proportion_ci(method="wilson")
        assert (row.error_rate_low, row.error_rate_high) == pytest.approx((low, high), abs=1e-14)
        change = wrong.double() - intact.double()
        assert row.error_rate_increase == pytest.approx(change.mean().item(), abs=1e-12)
        bounds = (row.error_rate_increase_low, row.error_rate_increase_high)
        assert bounds == pytest.approx(score_bounds(change.numpy()), abs=2e-6)
        assert row.num_examples == 37


@settings(max_examples=30, deadline=None)
@given(plans(min_blocks=2, max_blocks=6), st.integers(1, 50))
def test_single_deletions_of_any_chain(plan, batch_size):
    chain, loader = random_chain(plan), labelled(batch_size=batch_size)
    deletions = rp.single_deletions(chain)
    possible = [i for i, b in enumerate(chain) if b.skip is not None or b.keeps_shape]
    assert [lesion.blocks for lesion in deletions] == [(i,) for i in possible]
    assert [lesion.name for lesion in deletions] == [f"delete block{i}" for i in possible]
    if deletions:
        frame = rp.lesion_study(chain, loader, deletions, progress=False)
        assert frame.blocks.tolist() == [(i,) for i in possible]
        assert (frame.num_blocks == 1).all()
        for row in frame.itertuples():
            assert row.error_rate == one_by_one(rp.delete_block(chain, row.blocks[0]), loader)[0].double().mean().item()


class Counting(torch.nn.Module):
    """A part that counts how often it runs."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.part(x)


def test_no_step_is_computed_twice():
    chain = random_chain(STEADY)
    counted = chain.with_blocks(b.replace(branch=Counting(b.branch)) for b in chain)
    n = len(counted)
    loader = labelled(n=8, batch_size=8)
    frame = rp.lesion_study(counted, loader, rp.single_deletions(counted), progress=False)
    # Intact: n. Deleting block i: the n - 1 - i blocks after it, on their own; those before it are shared.
    assert sum(b.branch.calls for b in counted) == n + n * (n - 1) // 2
    assert frame.attrs["block_evaluations"] == n + n * (n - 1) // 2
    assert frame.attrs["block_evaluations_naive"] == n + n * (n - 1)


def test_a_step_repeated_by_several_lesions_is_shared():
    chain = random_chain(STEADY)
    deletions = [lambda c: rp.delete_blocks(c, [1, 4]), lambda c: rp.delete_blocks(c, [1, 5]), lambda c: c]
    frame = rp.lesion_study(chain, labelled(), deletions, progress=False)
    # Intact 6; without 1: blocks 2, 3 shared; then 5 for the first, and 4 for the second.
    assert frame.attrs["block_evaluations"] == 6 + 2 + 1 + 1


class Log(torch.nn.Module):
    """NaN where its input is below -1."""

    def forward(self, x):
        return torch.log(x + 1)


def test_logits_that_are_not_finite_count_as_wrong():
    chain, loader = random_chain(STEADY), labelled(n=400)
    broken = chain.with_blocks([*list(chain)[:5], chain[5].replace(post=Log())])
    frame = rp.lesion_study(chain, loader, [lambda c: broken], progress=False)
    with torch.inference_mode():
        finite = torch.cat([torch.isfinite(broken(x)).all(1) for x, _ in loader])
        right = torch.cat([broken(x).argmax(1) == y for x, y in loader])
    assert finite.any()
    assert (right & ~finite).any()
    assert frame.error_rate[0] == 1 - (finite & right).double().mean().item()


def test_a_shuffling_loader_gives_the_same_frame():
    chain = random_chain(STEADY)
    generator = torch.Generator().manual_seed(0)
    deletions = rp.single_deletions(chain)
    plain = rp.lesion_study(chain, labelled(), deletions, progress=False)
    shuffled = rp.lesion_study(chain, labelled(shuffle=True, generator=generator), deletions, progress=False)
    pd.testing.assert_frame_equal(plain, shuffled, rtol=1e-9)


def test_a_study_that_fails_leaves_the_chain_as_it_was():
    chain = random_chain(STEADY)
    before = snapshot(chain)

    def loader():
        yield from labelled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rp.lesion_study(chain, loader(), rp.single_deletions(chain), progress=False)
    assert_same(before, snapshot(chain))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader: got 'no batches'"),
        ([torch.zeros(2, 5)], "loader: got 'Tensor'; allowed: batches of"),
        ([(torch.zeros(2, 5).double(), torch.tensor([0, 3]))], r"labels: got \[0, 3\]; allowed: .* 0 to 2"),
        ([(torch.zeros(2, 5).double(), torch.tensor([0, -1]))], r"labels: got \[-1, 0\]"),
        ([(torch.zeros(2, 5).double(), torch.zeros(2))], r"labels: got 'torch.float32 \[2\]'; allowed: class indices"),
        ([(torch.zeros(2, 5).double(), torch.tensor([0]))], r"labels \[1\] for inputs \[2, 5\]"),
    ],
)
def test_bad_loaders(loader, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.lesion_study(random_chain(STEADY), loader, [lambda c: c], progress=False)


def test_parts_that_work_in_place_do_not_spoil_each_other():
    plain = random_chain(STEADY)
    spoiling = ResidualChain(plain.stem, plain, torch.nn.Sequential(torch.nn.ReLU(inplace=True), plain.head))
    copied = ResidualChain(plain.stem, plain, torch.nn.Sequential(torch.nn.ReLU(), plain.head))
    frames = [rp.lesion_study(c, labelled(), rp.single_deletions(c), progress=False) for c in (spoiling, copied)]
    assert frames[0].equals(frames[1])


def test_what_is_no_chain_is_refused():
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got 'Linear'; allowed: a ResidualChain.*unravel"):
        rp.lesion_study(torch.nn.Linear(2, 2), labelled(), [])
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got 'Linear'"):
        rp.single_deletions(torch.nn.Linear(2, 2))
    with pytest.raises(rp.ResnetPathsError, match=r"lesion 'nothing'.*got 'NoneType'"):
        rp.lesion_study(random_chain(STEADY), labelled(), [Lesion("", (), name="nothing", function=lambda c: None)])


def test_training_mode_is_refused():
    chain = random_chain(STEADY)
    moving = chain.with_blocks([chain[0].replace(post=torch.nn.BatchNorm1d(3).double()), *list(chain)[1:]])
    with pytest.raises(rp.ResnetPathsError, match=r"BatchNorm1d 'blocks.0.post' in training mode"):
        rp.lesion_study(moving, labelled(), [lambda c: c], progress=False)


def test_a_lesion_may_be_named():
    lesion = Lesion("", (2,), name="half of block 2", function=lambda c: rp.scale_block(c, 2, 0.5))
    frame = rp.lesion_study(random_chain(STEADY), labelled(), [lesion], progress=False)
    assert frame[["lesion", "blocks", "num_blocks"]].to_numpy().tolist() == [["half of block 2", (2,), 1]]

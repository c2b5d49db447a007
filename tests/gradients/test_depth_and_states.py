"""Gradients by depth, states of blocks and costs against other ways to get them, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.costs import forward_cost
from resnet_paths.gradients import scalar_gradients
from tests.chains import Plan, assert_same, inputs, random_chain, random_model, snapshot

LABELS = torch.tensor([0, 2, 1, 1])
PLANS = [
    (2, (Plan(2, "identity", False, False), Plan(2, "identity", True, False), Plan(2, "identity", False, False))),
    (2, (Plan(2, "identity", True, False), Plan(3, "projection", False, True), Plan(3, "identity", True, False))),
    (3, (Plan(2, "none", False, False), Plan(2, "none", True, False), Plan(3, "none", False, False))),
    (3, (Plan(3, "projection", False, True), Plan(2, "none", True, False), Plan(2, "identity", False, False))),
]


def over_examples(values):
    """Mean and standard error over the last dimension, by numpy."""
    values = np.asarray(values)
    return values.mean(-1), values.std(-1, ddof=1) / math.sqrt(values.shape[-1])


# gradient_by_depth


def norms_by_autograd(chain, x, y):
    """Norms [depth, example] of each example's own gradient, from a backward pass for each example alone."""
    columns = []
    for example, label in zip(x, y, strict=True):
        states = [chain.stem(example[None])]
        for block in chain:
            states.append(block(states[-1]))
        gradients = torch.autograd.grad(F.cross_entropy(chain.head(states[-1]), label[None]), states)
        columns.append([g.norm().item() for g in gradients])
    return np.array(columns).T


@pytest.mark.parametrize("plan", PLANS)
def test_the_gradient_at_every_depth_is_autograds(plan):
    chain, x = random_chain(plan), inputs()
    before = snapshot(chain)
    frame = rp.gradient_by_depth(chain, x, LABELS)
    assert_same(before, snapshot(chain))
    mean, error = over_examples(norms_by_autograd(chain, x, LABELS))
    np.testing.assert_allclose(frame.gradient_norm, mean, rtol=1e-10)
    np.testing.assert_allclose(frame.gradient_norm_se, error, rtol=1e-8, atol=1e-15)
    assert frame.depth.tolist() == list(range(len(chain) + 1))
    assert frame.block.tolist() == [*(b.name for b in chain), "head"]
    assert frame.stage[:-1].tolist() == [b.stage for b in chain]


def test_the_gradient_of_a_users_model_of_a_loader_and_in_little_memory():
    plan = (3, (Plan(3, "identity", True, False), Plan(2, "projection", False, True), Plan(2, "none", False, False)))
    model, x = random_model(plan), inputs()
    chain = rp.unravel(model, x)
    whole = rp.gradient_by_depth(chain, x, LABELS)
    loader = [(x[:1], LABELS[:1]), (x[1:], LABELS[1:])]
    for frame in (
        rp.gradient_by_depth(chain, loader, progress=False),
        rp.gradient_by_depth(chain, x, LABELS, memory_budget=1),
    ):
        np.testing.assert_allclose(frame.gradient_norm, whole.gradient_norm, rtol=1e-12)
        np.testing.assert_allclose(frame.gradient_norm_se, whole.gradient_norm_se, rtol=1e-10)
    states = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: states.append(args[0].clone().requires_grad_()) or states[-1])
    # The blocks work in place on what they read: the model is run for one example after the other.
    own = []
    for i in range(len(x)):
        states.clear()
        loss = F.cross_entropy(model(x[i : i + 1]), LABELS[i : i + 1])
        own.append([g.norm().item() for g in torch.autograd.grad(loss, states)])
    np.testing.assert_allclose(whole.gradient_norm[:-1], np.mean(own, 0), rtol=1e-10)


def test_a_gradient_too_small_for_float32_is_told():
    blocks = [Block(nn.Linear(2, 2, bias=False), None, name=f"block{i}") for i in range(40)]
    chain = ResidualChain(nn.Identity(), blocks, nn.Linear(2, 3)).eval()
    for block in chain:
        block.branch.weight.data = torch.eye(2) * 1e-2
    frame = rp.gradient_by_depth(chain, torch.ones(2, 2), torch.tensor([0, 1]))
    np.testing.assert_allclose(frame.gradient_norm[0] / frame.gradient_norm[40], 1e-80, rtol=1e-4)


def test_gradient_by_depth_refuses_bad_input():
    chain = random_chain((2, (Plan(2, "identity", False, False),)))
    with pytest.raises(rp.ResnetPathsError, match="targets: got"):
        rp.gradient_by_depth(chain, inputs())
    with pytest.raises(rp.ResnetPathsError, match=r"inputs: got .*at least one example"):
        rp.gradient_by_depth(chain, inputs()[:0], LABELS[:0])
    with pytest.raises(rp.ResnetPathsError, match="chain: got 'Linear'; allowed: a ResidualChain"):
        rp.gradient_by_depth(nn.Linear(2, 2), inputs(), LABELS)


# scalar_gradients


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("start", [1.0, -0.7])
def test_products_of_factors_are_autograds_derivative(activation, start):
    weights = torch.randn(25, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    frame = scalar_gradients(weights, activation, start)
    assert len(frame) == 2 * 26
    function = {"sigmoid": torch.sigmoid, "relu": torch.relu}[activation]
    for network, rows in frame.groupby("network"):
        x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        y = x
        for depth, row in enumerate(rows.itertuples()):
            if depth:
                added = function(weights[depth - 1] * y)
                y = y + added if network == "residual" else added
            (slope,) = torch.autograd.grad(y, x, retain_graph=True)
            assert (row.depth, row.state, row.gradient) == pytest.approx((depth, y.item(), slope.item()), rel=1e-12)
        assert rows.gradient.to_numpy() == pytest.approx(rows.factor.cumprod().to_numpy())


def test_a_sigmoid_far_out_neither_overflows_nor_becomes_more_than_flat():
    frame = scalar_gradients([1000.0, -1000.0])
    assert frame.gradient.abs().max() <= 1
    assert frame.state.between(0, 2).all()


def test_scalar_gradients_refuses_bad_input():
    with pytest.raises(rp.ResnetPathsError, match="activation: got 'gelu'; allowed: 'sigmoid' or 'relu'"):
        scalar_gradients([1.0], "gelu")
    with pytest.raises(rp.ResnetPathsError, match="weights: got nan"):
        scalar_gradients([1.0, math.nan])
    with pytest.raises(rp.ResnetPathsError, match="start: got inf"):
        scalar_gradients([1.0], start=math.inf)


# block_norms


def states_by_hand(chain, x, num_blocks, without_branches=False):
    """The states between the first blocks, of the chain or of its path of skips alone."""
    states = [chain.stem(x)]
    for block in list(chain)[:num_blocks]:
        shared = block.pre(states[-1])
        parts = [p(shared) for p in (block.skip, None if without_branches else block.branch) if p is not None]
        states.append(block.post(sum(parts)))
    return states


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_norms_of_blocks_are_those_by_hand(plan):
    chain, x = random_chain(plan), inputs()
    before = snapshot(chain)
    frame = rp.block_norms(chain, x)
    assert_same(before, snapshot(chain))
    states = states_by_hand(chain, x, len(chain))
    has_skips = True
    for index, block in enumerate(chain):
        has_skips &= block.skip is not None
        state, row = states[index], frame.iloc[index]
        shared = block.pre(state)
        skip, branch = (None if part is None else part(shared).numpy() for part in (block.skip, block.branch))
        expected = {"input_norm": np.linalg.norm(state, axis=1), "branch_norm": np.linalg.norm(branch, axis=1)}
        total = branch if skip is None else skip + branch
        expected["sum_norm"] = np.linalg.norm(total, axis=1)
        if skip is not None:
            lengths = np.linalg.norm(skip, axis=1), np.linalg.norm(branch, axis=1)
            expected |= {"skip_norm": lengths[0], "cosine": (skip * branch).sum(1) / (lengths[0] * lengths[1])}
        if has_skips:
            kept, output = (
                states_by_hand(chain, x, index + 1, without_branches=True)[-1].numpy(),
                states[index + 1].numpy(),
            )
            expected["kept_signal_share"] = (kept * output).sum(1) / (output * output).sum(1)
        for name in ("input_norm", "skip_norm", "branch_norm", "sum_norm", "cosine", "kept_signal_share"):
            if name in expected:
                mean, error = over_examples(expected[name])
                assert row[name] == pytest.approx(mean, rel=1e-10), name
                assert row[f"{name}_se"] == pytest.approx(error, rel=1e-8, abs=1e-14), name
            else:
                assert math.isnan(row[name]), name
    assert frame.block.tolist() == [b.name for b in chain]
    assert (frame.num_examples == 4).all()


def test_the_path_of_skips_alone_is_what_is_kept():
    plan = (
        3,
        (Plan(3, "identity", True, False), Plan(2, "projection", False, True), Plan(2, "identity", False, False)),
    )
    chain, x = random_chain(plan), inputs()
    alone = rp.path_network(chain, (False, False, False))
    with torch.no_grad():
        kept, output = (
            alone.blocks[2](alone.blocks[1](alone.blocks[0](chain.stem(x)))),
            states_by_hand(chain, x, len(chain))[-1],
        )
    share = ((kept * output).sum(1) / (output * output).sum(1)).mean().item()
    assert rp.block_norms(chain, x).kept_signal_share.iloc[-1] == pytest.approx(share)
    assert rp.block_norms(alone, x).kept_signal_share.tolist() == pytest.approx([1, 1, 1])


def test_norms_of_deleted_blocks_of_loaders_and_of_models():
    plan = (3, (Plan(3, "identity", True, False), Plan(3, "identity", False, False)))
    model, x = random_model(plan), inputs()
    chain = rp.unravel(model, x)
    whole = rp.block_norms(chain, x)
    by_loader = rp.block_norms(chain, [(x[:1], None), (x[1:], None)])
    np.testing.assert_allclose(whole.select_dtypes("number"), by_loader.select_dtypes("number"), rtol=1e-10)
    lesioned = rp.block_norms(rp.delete_block(chain, 1), x)
    assert lesioned.branch_norm.isna().tolist() == [False, True]
    assert lesioned.sum_norm[1] == pytest.approx(lesioned.input_norm[1])
    assert rp.block_norms(chain, x[:1]).branch_norm_se.isna().all()


def test_block_norms_refuses_bad_input():
    chain = random_chain((2, (Plan(2, "identity", False, False),)))
    with pytest.raises(rp.ResnetPathsError, match="inputs: got 'no examples'"):
        rp.block_norms(chain, inputs()[:0])
    with pytest.raises(rp.ResnetPathsError, match="chain: got 'Linear'"):
        rp.block_norms(nn.Linear(2, 2), inputs())
    training = ResidualChain(nn.BatchNorm1d(5), [], nn.Linear(5, 3)).double()
    with pytest.raises(rp.ResnetPathsError, match=r"chain: got .*in training mode"):
        rp.block_norms(training, inputs())


# forward_cost


def test_costs_are_counted_and_measured():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 4)
    ).eval()
    cost = forward_cost(module, torch.zeros(6, 3, 5, 5), min_seconds=0.001)
    assert cost.num_parameters == 3 * 8 * 9 + 8 * 25 * 4 + 4
    assert cost.num_multiply_adds == 3 * 8 * 9 * 25 + 8 * 25 * 4
    assert 0 < cost.microseconds < 1e6
    slower = nn.Sequential(*[nn.Linear(300, 300) for _ in range(30)])
    x = torch.zeros(16, 300)
    assert (
        forward_cost(slower, x, min_seconds=0.01).microseconds
        > 2 * forward_cost(slower[:3], x, min_seconds=0.01).microseconds
    )
    with pytest.raises(rp.ResnetPathsError, match=r"inputs: got .*at least one example"):
        forward_cost(module, torch.zeros(0, 3, 5, 5))

"""Groups of blocks: bit for bit what the chain returns, deletions as by hand, paths and gradients as enumerated."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.groups import ungrouped
from tests.chains import Plan, branch, inputs, plans, random_chain

STEADY = (3, tuple(Plan(3, "identity", False, False) for _ in range(6)))


def run_blocks(chain, order, x):
    state = chain.stem(x)
    for index in order:
        state = chain[index](state)
    return chain.head(state)


@settings(max_examples=60, deadline=None)
@given(plans(min_blocks=2), st.data())
def test_a_grouped_chain_returns_the_same_bits(plan, data):
    chain = random_chain(plan)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(chain) - 1))))
    runs = [list(range(a, b)) for a, b in itertools.pairwise([0, *cuts, len(chain)])]
    grouped = rp.group_blocks(chain, runs)
    assert len(grouped) == len(runs)
    assert torch.equal(grouped(inputs()), chain(inputs()))
    assert torch.equal(grouped.run_with_cache(inputs())[0], chain(inputs()))
    assert torch.equal(ungrouped(grouped)(inputs()), chain(inputs()))
    assert {id(p) for p in grouped.parameters()} == {id(p) for p in chain.parameters()}
    for index, run in enumerate(runs):
        state = chain.stem(inputs())
        for block in list(chain)[: run[0]]:
            state = block(state)
        first, last = chain[run[0]], chain[run[-1]]
        if first.in_shape != last.out_shape and any(chain[i].skip is None for i in run):
            with pytest.raises(rp.ResnetPathsError, match="a block with a skip, or one that keeps the shape"):
                rp.delete_block(grouped, index)
            continue
        if first.in_shape != last.out_shape:
            for i in run:
                state = chain[i].post(chain[i].skip(chain[i].pre(state)))
        for block in list(chain)[run[-1] + 1 :]:
            state = block(state)
        assert torch.equal(rp.delete_block(grouped, index)(inputs()), chain.head(state))


def test_paths_of_groups_are_those_of_their_blocks_by_enumeration():
    chain = random_chain(STEADY)
    runs = [[0, 1, 2], [3, 4], [5]]
    grouped = rp.group_blocks(chain, runs)
    assert [block.name for block in grouped] == ["block0:block2", "block3:block4", "block5"]
    assert grouped.num_paths == 8
    stands_for = dict.fromkeys(rp.enumerate_paths(grouped), 0)
    for path in rp.enumerate_paths(chain):
        stands_for[tuple(any(path[i] for i in run) for run in runs)] += 1
    for path, number in stands_for.items():
        assert number == (7 if path[0] else 1) * (3 if path[1] else 1)


def test_gradients_by_layers_are_sums_over_enumerated_paths_of_blocks():
    chain, x, y = random_chain(STEADY), inputs(), torch.tensor([0, 1, 2, 0])
    runs = [[0, 1], [2, 3], [4, 5]]
    frame = rp.gradient_by_path_length(rp.group_blocks(chain, runs), x, y)
    x = x.clone().requires_grad_()
    states = [chain.stem(x)]
    jacobians = []
    for block in chain:
        given = states[-1].detach()
        single = [torch.func.jacrev(block.branch)(row) for row in given]
        jacobians.append(torch.stack(single))
        states.append(block(given))
    last = states[-1].detach().requires_grad_()
    loss = nn.functional.cross_entropy(chain.head(last), y, reduction="sum")
    (top,) = torch.autograd.grad(loss, last)
    sums = torch.zeros(4, *x.shape, dtype=torch.float64)
    for path in itertools.product((False, True), repeat=6):
        vector = top
        for taken, jacobian in zip(reversed(path), reversed(jacobians), strict=True):
            vector = torch.einsum("bo,boi->bi", vector, jacobian) if taken else vector
        sums[sum(any(path[i] for i in run) for run in runs)] += vector @ chain.stem.weight
    expected = sums.norm(dim=2).mean(1)
    torch.testing.assert_close(torch.tensor(frame.summed_path_gradient_norm.to_numpy()), expected)


def test_edits_of_groups_run_whole_runs():
    chain, x = random_chain(STEADY), inputs()
    grouped = rp.group_blocks(chain, [[0], [1, 2], [3, 4], [5]])
    assert torch.equal(rp.swap_blocks(grouped, 1, 2)(x), run_blocks(chain, (0, 3, 4, 1, 2, 5), x))
    assert torch.equal(rp.duplicate_block(grouped, 1)(x), run_blocks(chain, (0, 1, 2, 1, 2, 3, 4, 5), x))
    inside = rp.delete_block(grouped, "block2")
    assert torch.equal(inside(x), rp.delete_block(chain, 2)(x))
    assert torch.equal(rp.delete_block(inside, 1)(x), rp.delete_blocks(chain, [1, 2])(x))
    halved = rp.scale_block(grouped, 1, 0.5)(x)
    state = chain[0](chain.stem(x))
    state = (state + chain[2](chain[1](state))) / 2
    torch.testing.assert_close(halved, chain.head(chain[5](chain[4](chain[3](state)))))


def test_a_study_of_layers_shares_the_blocks_of_the_chain():
    chain = random_chain(STEADY)
    layers = rp.group_blocks(chain, [[0, 1], [2, 3], [4, 5]])
    batches = [(inputs(), torch.tensor([0, 1, 2, 0]))]
    frame = rp.lesion_study(layers, batches, rp.single_deletions(layers), progress=False)
    for index, row in frame.iterrows():
        logits = run_blocks(chain, [i for i in range(6) if i // 2 != index], inputs())
        assert row.error_rate == (logits.argmax(1) != batches[0][1]).double().mean().item()
    assert frame.attrs["block_evaluations"] == 6 + 4 + 2
    assert copy.deepcopy(layers)[0].run is not None


def test_one_of_several_branches_is_deleted_by_its_name():
    chain = random_chain(STEADY)
    side_by_side = rp.parallel_blocks(chain, [1, 2, 3], combine="sum")
    state = chain[0](chain.stem(inputs()))
    for lost in ([1], [1, 3], [1, 2, 3]):
        edited = rp.delete_blocks(side_by_side, [f"block{i}" for i in lost])
        kept = state + sum((chain[i].branch(state) for i in (1, 2, 3) if i not in lost), torch.zeros(()))
        torch.testing.assert_close(edited(inputs()), chain.head(chain[5](chain[4](kept))))
        assert edited.num_paths == 8 * (4 - len(lost))
    scaled = rp.scale_block(side_by_side, "block2", 0.5)(inputs())
    kept = state + chain[1].branch(state) + chain[2].branch(state) / 2 + chain[3].branch(state)
    torch.testing.assert_close(scaled, chain.head(chain[5](chain[4](kept))))


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("layer", r"unit: got 'layer'; allowed: 'transformer_layer' or 'stage', or a list of runs"),
        ([[0, 2]], r"unit: got \['block0', 'block2'\]; allowed: runs of blocks that stand side by side"),
        ([[0, 1], [1, 2]], r"unit: got 'block1'; allowed: runs without a block in common"),
    ],
)
def test_runs_that_are_none(unit, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        rp.group_blocks(random_chain(STEADY), unit)


def test_stages_are_named_after_their_module():
    names = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    blocks = [
        Block(branch(3, 3), nn.Identity(), name=name, stage=i // 2, in_shape=(3,), out_shape=(3,))
        for i, name in enumerate(names)
    ]
    chain = ResidualChain(nn.Linear(5, 3), blocks, nn.Linear(3, 3)).double().eval()
    stages = rp.group_blocks(chain, "stage")
    assert [block.name for block in stages] == ["layer1", "layer2"]
    assert [block.skip_kind for block in stages] == ["identity", "identity"]
    assert torch.equal(rp.delete_block(stages, "layer1")(inputs()), rp.delete_blocks(chain, [0, 1])(inputs()))

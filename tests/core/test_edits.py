"""Edits: pure, sharing weights, and equal to what plain PyTorch gives by hand."""

from __future__ import annotations

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import Parallel
from tests.chains import assert_same, branch, inputs, plans, random_chain, random_model, snapshot

STEADY = (3, ())


def steady_chain(num_blocks: int, seed: int = 0) -> ResidualChain:
    """Pre-activation blocks of one stage."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [
            Block(branch(3, 3), nn.Identity(), name=f"layer1.{i}", in_shape=(3,), out_shape=(3,))
            for i in range(num_blocks)
        ]
        return ResidualChain(nn.Linear(5, 3), blocks, nn.Linear(3, 3)).double().eval()


def by_hand(chain, order=None, deleted=(), scale=None):
    """The edited network, written out."""
    x = chain.stem(inputs())
    for i in range(len(chain)) if order is None else order:
        block = chain[i]
        h = block.pre(x)
        if i in deleted:
            x = block.post(h if block.skip is None else block.skip(h))
        else:
            factor = (scale or {}).get(i, 1.0)
            y = factor * block.branch(h)
            x = block.post(y if block.skip is None else block.skip(h) + y)
    return chain.head(x)


def deletable(chain):
    return [i for i, block in enumerate(chain) if block.skip is not None or block.keeps_shape]


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_deleting_equals_leaving_the_branch_out(plan, data):
    chain = random_chain(plan)
    lost = data.draw(st.sets(st.sampled_from(deletable(chain)))) if deletable(chain) else set()
    edited = rp.delete_blocks(chain, lost)
    assert torch.equal(edited(inputs()), by_hand(chain, deleted=lost))
    assert len(edited) == len(chain)
    halved = sum(chain[i].skip is not None for i in lost)
    assert edited.num_paths * 2**halved == chain.num_paths


@settings(max_examples=30, deadline=None)
@given(plans(min_blocks=2, skips=("identity",)), st.data())
def test_deleting_equals_zeroing_the_branchs_last_map(plan, data):
    chain = random_chain(plan)
    index = data.draw(st.integers(0, len(chain) - 1))
    zeroed = copy.deepcopy(chain)
    nn.init.zeros_(zeroed[index].branch[2].weight)
    nn.init.zeros_(zeroed[index].branch[2].bias)
    torch.testing.assert_close(rp.delete_block(chain, index)(inputs()), zeroed(inputs()), rtol=0, atol=0)


@settings(max_examples=30, deadline=None)
@given(plans(min_blocks=2, skips=("identity",)), st.data())
def test_deletions_commute_and_repeat_to_no_effect(plan, data):
    chain = random_chain(plan)
    i, j = (data.draw(st.integers(0, len(chain) - 1)) for _ in range(2))
    one = rp.delete_block(rp.delete_block(chain, i), j)
    other = rp.delete_block(rp.delete_block(chain, j), i)
    both = rp.delete_blocks(chain, [i, j])
    assert torch.equal(one(inputs()), other(inputs()))
    assert torch.equal(one(inputs()), both(inputs()))
    assert one.path_choices == other.path_choices == both.path_choices


def test_deleting_nothing_is_the_identity():
    chain = steady_chain(4)
    assert torch.equal(rp.delete_blocks(chain, [])(inputs()), chain(inputs()))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)))
def test_a_permutation_undone_restores(order):
    chain = steady_chain(5)
    permuted = rp.permute_blocks(chain, order)
    assert torch.equal(permuted(inputs()), by_hand(chain, order))
    undone = rp.permute_blocks(permuted, [f"layer1.{i}" for i in range(5)])
    assert torch.equal(undone(inputs()), chain(inputs()))


def test_swap_and_reverse_are_permutations():
    chain = steady_chain(4)
    assert [b.name for b in rp.swap_blocks(chain, 0, "layer1.2")] == ["layer1.2", "layer1.1", "layer1.0", "layer1.3"]
    assert [b.name for b in rp.reverse_blocks(chain, stage=0)] == [f"layer1.{i}" for i in (3, 2, 1, 0)]


@settings(max_examples=30, deadline=None)
@given(plans(min_blocks=3, skips=("identity",)))
def test_reversing_keeps_the_block_that_opens_the_stage(plan):
    chain = random_chain(plan)
    for stage in {b.stage for b in chain}:
        places = [i for i, b in enumerate(chain) if b.stage == stage and b.keeps_shape]
        order = list(range(len(chain)))
        for place, source in zip(places, reversed(places), strict=True):
            order[place] = source
        assert torch.equal(rp.reverse_blocks(chain, stage)(inputs()), by_hand(chain, order))


def test_duplicating_runs_a_block_twice():
    chain = steady_chain(3)
    twice = rp.duplicate_block(chain, 1)
    assert [b.name for b in twice] == ["layer1.0", "layer1.1", "layer1.1#2", "layer1.2"]
    assert torch.equal(twice(inputs()), by_hand(chain, [0, 1, 1, 2]))
    assert twice.num_paths == 16
    thrice = rp.duplicate_block(twice, "layer1.1#2")
    assert len({b.name for b in thrice}) == 5
    assert len(list(thrice.parameters())) == len(list(chain.parameters()))


@pytest.mark.parametrize(
    "blocks", [["mlp", "mlp"], ["inner", "inner.1", "layer1.2"], ["inner.1", "inner.1", 2, 2, "inner"]]
)
def test_a_name_may_be_deleted_twice_or_with_what_holds_it(blocks):
    chain = steady_chain(3)
    branches = Parallel([branch(3, 3).double(), with_inner_chain()], names=["mlp", "inner"])
    chain = chain.with_blocks([chain[0], chain[1].replace(branch=branches), chain[2]])
    state = chain[0](chain.stem(inputs()))
    kept = [name for name in ("mlp", "inner") if name not in blocks]
    state = sum((branches[branches.names.index(name)](state) for name in kept), state)
    state = state if "layer1.2" in blocks or 2 in blocks else chain[2](state)
    torch.testing.assert_close(rp.delete_blocks(chain, blocks)(inputs()), chain.head(state), rtol=0, atol=1e-14)
    with pytest.raises(rp.ResnetPathsError, match=r"block: got 'mpl'"):
        rp.delete_blocks(chain, [*blocks, "mpl"])


def all_names(blocks):
    """Names of blocks and branches at any depth, by a walk over all modules."""
    inside = [module for block in blocks for module in block.modules()]
    branches = [name for module in inside if isinstance(module, Parallel) for name in module.names]
    return branches + [module.name for module in inside if isinstance(module, Block)]


@pytest.mark.parametrize("kind", ["chain", "branches", "group"])
def test_blocks_inside_a_copy_have_names_of_their_own(kind):
    chain = steady_chain(4)
    if kind == "group":
        chain = rp.group_blocks(chain, [[1, 2]])
        first = "layer1.1"
    else:
        inner = with_inner_chain()
        branches = inner if kind == "chain" else Parallel([branch(3, 3).double(), inner], names=["mlp", "inner"])
        chain = chain.with_blocks([chain[0], chain[1].replace(branch=branches), *list(chain)[2:]])
        first = "inner.0"
    twice = rp.duplicate_block(chain, 1)
    thrice = rp.duplicate_block(rp.duplicate_block(twice, twice[2].name), f"{first}#2")
    repeated = rp.Lesion("repeat", (0, 1, 2, 3)).edit(chain) if kind != "group" else twice
    for edited in (twice, thrice, repeated):
        names = all_names(edited)
        assert len(set(names)) == len(names)
    x = chain.stem(inputs())
    x = chain[0](x)
    lost = rp.delete_block(chain, first)[1]
    for name, runs in ((first, (lost, chain[1])), (f"{first}#2", (chain[1], lost))):
        state = x
        for block in (*runs, *list(chain)[2:]):
            state = block(state)
        assert torch.equal(rp.delete_block(twice, name)(inputs()), chain.head(state))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, -2.0, 3, np.float32(0.5), np.int64(3)])
def test_scaling(factor):
    chain = steady_chain(3)
    assert torch.equal(rp.scale_block(chain, 1, factor)(inputs()), by_hand(chain, scale={1: factor}))
    assert rp.scale_block(chain, 1, factor).num_paths == 8


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_parallel_blocks(combine):
    chain = steady_chain(5)
    edited = rp.parallel_blocks(chain, [1, 2, 3], combine=combine)
    x = chain[0](chain.stem(inputs()))
    branches = torch.stack([chain[i].branch(x) for i in (1, 2, 3)])
    y = x + (branches.mean(0) if combine == "mean" else branches.sum(0))
    torch.testing.assert_close(edited(inputs()), chain.head(chain[4](y)))
    assert [b.name for b in edited] == ["layer1.0", "layer1.1|layer1.2|layer1.3", "layer1.4"]
    # One of four alternatives in the middle, two at either side.
    assert edited.num_paths == 2 * 4 * 2
    assert rp.path_histogram(edited).num_paths.tolist() == [1, 5, 7, 3]
    if combine == "mean":
        outputs = torch.stack([chain[i](x) for i in (1, 2, 3)]).mean(0)
        torch.testing.assert_close(edited[1](x), outputs)


def with_inner_chain():
    inner = ResidualChain(nn.Linear(3, 3), list(steady_chain(3, seed=1)), nn.Linear(3, 3)).double().eval()
    return inner.with_blocks(block.replace(name=f"inner.{i}") for i, block in enumerate(inner))


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_paths_through_chains_inside_parallel_branches_count(combine):
    chain = steady_chain(3)
    inner = with_inner_chain()
    nested = chain.with_blocks([chain[0].replace(branch=inner), *list(chain)[1:]])
    assert nested.num_paths == 9 * 4
    edited = rp.parallel_blocks(nested, [0, 1], combine=combine)
    x = chain.stem(inputs())
    added = inner(x) + chain[1].branch(x)
    y = x + (added / 2 if combine == "mean" else added)
    torch.testing.assert_close(edited(inputs()), chain.head(chain[2](y)))
    # The skip, the other branch, and the 8 paths of the inner chain, of one length more each; then the last block.
    lengths = np.convolve([1, 2, 3, 3, 1], [1, 1])
    assert rp.path_histogram(edited).num_paths.tolist() == edited.length_polynomial("block") == lengths.tolist()
    assert edited.num_paths == len(list(rp.enumerate_paths(edited))) == 20


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("onto_skip", [False, True])
def test_scaling_keeps_the_paths_of_chains_inside_several_branches(onto_skip, factor):
    chain = steady_chain(2)
    inner = with_inner_chain()
    block = chain[0].replace(branch=Parallel([branch(3, 3), inner], onto_skip=onto_skip)).double().eval()
    nested = chain.with_blocks([block, chain[1]])
    scaled = rp.scale_block(nested, 0, factor)
    assert scaled.path_choices == nested.path_choices
    x, y = inputs(), torch.tensor([0, 1, 2, 0])
    h = nested.stem(x)
    by_hand = nested.head(nested[1](h + factor * (block.branch[0](h) + inner(h))))
    torch.testing.assert_close(scaled(x), by_hand)
    shares = [rp.gradient_by_path_length(c, x, y, progress=False).gradient_share for c in (scaled, nested)]
    assert len(shares[0]) == 6
    if factor == 1:
        np.testing.assert_allclose(*shares, atol=1e-12)
    assert torch.equal(
        rp.delete_block(scaled, "inner.1")(x), rp.scale_block(rp.delete_block(nested, "inner.1"), 0, factor)(x)
    )


def test_paths_through_parallel_blocks_run_alone():
    chain = rp.parallel_blocks(steady_chain(3), [0, 1], combine="sum")
    for path in rp.enumerate_paths(chain):
        x = chain.stem(inputs())
        for block, entry in zip(chain, path, strict=True):
            members = list(block.branch) if block.name.count("|") else [block.branch]
            x = members[entry - 1](x) if entry else x
        assert torch.equal(rp.path_network(chain, path)(inputs()), chain.head(x))


@settings(max_examples=25, deadline=None)
@given(plans(max_blocks=5))
def test_every_path_runs_alone(plan):
    chain = random_chain(plan)
    for path in itertools.islice(rp.enumerate_paths(chain), 32):
        alone = rp.path_network(chain, path)
        x = chain.stem(inputs())
        for block, entry in zip(chain, path, strict=True):
            h = block.pre(x)
            x = block.post(block.branch(h) if entry else block.skip(h))
        assert torch.equal(alone(inputs()), chain.head(x))
        assert (alone.num_paths, alone.path_choices) == (1, tuple((entry,) for entry in path))


EDITS = {
    "delete": lambda c: rp.delete_block(c, 1),
    "permute": lambda c: rp.permute_blocks(c, [2, 1, 0, 3]),
    "swap": lambda c: rp.swap_blocks(c, 0, 1),
    "duplicate": lambda c: rp.duplicate_block(c, 2),
    "scale": lambda c: rp.scale_block(c, 0, 0.5),
    "reverse": lambda c: rp.reverse_blocks(c, 0),
    "parallel": lambda c: rp.parallel_blocks(c, [1, 2]),
    "path": lambda c: rp.path_network(c, [True, False, True, False]),
    "unknown block": lambda c: rp.delete_block(c, 99),
    "not a permutation": lambda c: rp.permute_blocks(c, [0, 0, 1, 2]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_the_source_is_untouched_and_weights_are_shared(edit):
    chain = steady_chain(4)
    chain[2].train()  # a mode that is not the same everywhere must survive too
    before, output = snapshot(chain), chain(inputs())
    with contextlib.suppress(rp.ResnetPathsError):
        edited = edit(chain)
        edited(inputs())
        assert {id(p) for p in edited.parameters()} <= {id(p) for p in chain.parameters()}
        assert isinstance(edited, nn.Module)
    assert_same(before, snapshot(chain))
    assert torch.equal(output, chain(inputs()))


@pytest.mark.parametrize("name", [n for n in EDITS if n not in ("unknown block", "not a permutation")])
def test_an_edited_chain_can_be_saved_edited_and_copied(name, tmp_path):
    chain, other = EDITS[name](steady_chain(4)), EDITS[name](steady_chain(4, seed=9))
    assert not torch.equal(chain(inputs()), other(inputs()))
    save_model(chain, tmp_path / "chain.safetensors")
    load_model(other, tmp_path / "chain.safetensors")
    assert torch.equal(chain(inputs()), other(inputs()))
    if name != "path":
        again = rp.delete_block(chain, -1)
        assert again.num_paths < chain.num_paths
    assert torch.equal(copy.deepcopy(chain)(inputs()), chain(inputs()))


def test_a_model_is_unraveled_first():
    model = random_model((3, (*[plan_of(3)] * 3,)))
    edited = rp.delete_block(model, "blocks.1", example_inputs=inputs())
    assert torch.equal(edited(inputs()), rp.delete_block(rp.unravel(model, inputs()), 1)(inputs()))
    assert {id(p) for p in edited.parameters()} < {id(p) for p in model.parameters()}


def plan_of(width, skip="identity"):
    from tests.chains import Plan

    return Plan(width, skip, post=False, shared_pre=False)


def test_a_plain_block_is_deleted_only_where_it_keeps_the_shape():
    chain = random_chain((2, (plan_of(2, "none"), plan_of(3, "none"), plan_of(3, "none"))))
    assert torch.equal(rp.delete_block(chain, 0)(inputs()), by_hand(chain, deleted=[0]))
    assert chain.num_paths == rp.delete_block(chain, 0).num_paths == 1
    assert rp.path_histogram(rp.delete_block(chain, 0)).num_paths.tolist() == [0, 0, 1]
    with pytest.raises(rp.ResnetPathsError, match=r"block: got 'block1'; .*a skip.*from \(2,\) to \(3,\)"):
        rp.delete_block(chain, 1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: rp.delete_block(c, "layer1.33"), r"block: got 'layer1.33'; .*nearest 'layer1.3'"),
        (lambda c: rp.delete_block(c, 4), r"block: got 4; allowed: a position from -4 to 3"),
        (lambda c: rp.delete_block(c, -5), r"block: got -5"),
        (lambda c: rp.delete_block(c, 1.5), r"block: got 1.5; allowed: the position or the name"),
        (lambda c: rp.delete_block(c, True), r"block: got True"),
        (lambda c: rp.delete_blocks(c, "layer1.0"), r"blocks: got 'layer1.0'; allowed: a list.*Write \['layer1.0'\]"),
        (lambda c: rp.delete_blocks(c, 5.0), r"blocks: got 5.0; allowed: a list"),
        (lambda c: rp.path_network(nn.Linear(2, 2), [True]), r"chain: got 'Linear'; allowed: a ResidualChain"),
        (lambda c: rp.permute_blocks(c, [0, 1]), r"order: got \[0, 1\]; allowed: a permutation of the 4 blocks"),
        (lambda c: rp.scale_block(c, 0, float("nan")), r"factor: got nan; allowed: a finite number"),
        (lambda c: rp.scale_block(rp.delete_block(c, 0), 0, 2.0), r"block: got 0; .*branch is deleted"),
        (lambda c: rp.reverse_blocks(c, 7), r"stage: got 7; allowed: one of \[0\]"),
        (lambda c: rp.parallel_blocks(c, [0, 2]), r"blocks: got \[0, 2\]; allowed: at least two blocks"),
        (lambda c: rp.parallel_blocks(c, [0, 1], combine="max"), r"combine: got 'max'"),
        (lambda c: rp.parallel_blocks(rp.delete_block(c, 0), [0, 1]), r"blocks: got 'layer1.0'"),
        (lambda c: rp.path_network(c, [True]), r"path: got \(True,\); allowed: 4 entries"),
        (lambda c: rp.delete_block(nn.Linear(2, 2), 0), r"example_inputs: got None; .*Linear.*not a chain yet"),
    ],
)
def test_bad_input(edit, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        edit(steady_chain(4))


def test_the_ends_keep_their_shapes():
    chain = random_chain((2, (plan_of(3, "projection"), plan_of(2, "projection"))))
    with pytest.raises(rp.ResnetPathsError, match=r"order: got 'block1'; allowed: a block with in_shape \(2,\)"):
        rp.swap_blocks(chain, 0, 1)


def test_blocks_of_other_shapes_do_not_trade_places():
    chain = random_chain((2, (plan_of(2), plan_of(3, "projection"), plan_of(3))))
    with pytest.raises(rp.ResnetPathsError, match=r"blocks: got \"'block1' after 'block2'\"|one stage"):
        rp.swap_blocks(chain, 0, 2)
    with pytest.raises(rp.ResnetPathsError, match="takes 3, not 2"):
        rp.duplicate_block(chain, 1)


def test_a_state_of_several_tensors_is_refused_not_joined():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    chain = ResidualChain(nn.Identity(), [Block(Pair(), Pair(), name="pair")], nn.Identity())
    with pytest.raises(rp.ResnetPathsError, match=r"state: got '2 tensors'; allowed: one tensor. Concatenate them"):
        chain(torch.zeros(2, 3))

"""Many chains on one batch: each prediction that of the chain alone, no step computed twice, few states alive."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import LinearCombination
from resnet_paths.lesions.trie import Trie, steps_of
from tests.chains import Plan, inputs, plans, random_chain
from tests.gradients.gradient_reference import build, recipes, seeded

STEADY = (3, tuple(Plan(3, "identity", False, False) for _ in range(6)))


def edited(chain, kind, i, j):
    """An edit of `chain`; the chain itself where this one is not possible."""
    i, j = i % len(chain), j % len(chain)
    inner = chain[i].branch
    edits = {
        "delete": lambda: rp.delete_block(chain, i),
        "delete two": lambda: rp.delete_blocks(chain, {i, j}),
        "swap": lambda: rp.swap_blocks(chain, i, j),
        "duplicate": lambda: rp.duplicate_block(chain, i),
        "scale": lambda: rp.scale_block(chain, i, 0.5 + j),
        "parallel": lambda: rp.parallel_blocks(chain, [i, i + 1]),
        "head": lambda: chain.with_head(LinearCombination([chain.head], [2.0])),
        "stem": lambda: ResidualChain(LinearCombination([chain.stem], [2.0]), chain, chain.head),
        "inside": lambda: chain.with_blocks(
            b.replace(branch=rp.delete_block(inner, j % len(inner))) if k == i else b for k, b in enumerate(chain)
        ),
    }
    try:
        return edits[kind]()
    except (rp.ResnetPathsError, TypeError, AttributeError):
        return chain


KINDS = ["delete", "delete two", "swap", "duplicate", "scale", "parallel", "head", "stem", "inside"]
EDITS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8)


def chains_of(chain, edits):
    """The chain, lesions of it, and lesions of a lesion."""
    made = [chain]
    for kind, i, j in edits:
        made.append(edited(made[(i * j) % len(made)], kind, i, j))
    return made


def assert_exact(chains, x):
    """Each prediction is that of a copy of the chain that runs alone, and no input was changed."""
    copies = copy.deepcopy(chains)
    before = x.clone()
    with torch.inference_mode():
        found = dict(Trie(chains).logits(x))
        assert torch.equal(x, before)
        assert sorted(found) == list(range(len(chains)))
        for index, alone in enumerate(copies):
            assert torch.equal(found[index], alone(x.clone())), index


@settings(max_examples=40, deadline=None)
@given(plans(min_blocks=2), EDITS)
def test_exact_for_any_edits(plan, edits):
    assert_exact(chains_of(random_chain(plan), edits), inputs())


@settings(max_examples=40, deadline=None)
@given(recipes(max_blocks=6), EDITS)
def test_exact_for_chains_inside_branches(recipe, edits):
    assert_exact(chains_of(build(recipe), edits), inputs())


class AddsInPlace(nn.Module):
    """A branch that begins by changing what it is given."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        x += 0.25
        return self.linear(x)


def in_place_chain(kind):
    with seeded():
        parts = {
            "branch": lambda: (AddsInPlace(3), None),
            "relu": lambda: (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), None),
            "post": lambda: (nn.Linear(3, 3), nn.ReLU(inplace=True)),
            "traced": lambda: (torch.fx.symbolic_trace(AddsInPlace(3)), None),
            "hook": lambda: (nn.Linear(3, 3), None),
        }[kind]
        made = [parts() for _ in range(5)]
        blocks = [
            Block(b, nn.Identity(), post=p, name=f"b{i}", in_shape=(3,), out_shape=(3,))
            for i, (b, p) in enumerate(made)
        ]
        if kind == "hook":
            for block in blocks:
                block.branch.register_forward_pre_hook(lambda _, args: args[0].mul_(0.9))
        stem, head = nn.Linear(5, 3), nn.Linear(3, 3)
        return ResidualChain(stem, blocks, head).double().eval()


@pytest.mark.parametrize("eval_only", [False, True])  # True: put into a chain that was read from a model
@pytest.mark.parametrize("kind", ["branch", "relu", "post", "traced", "hook"])
def test_parts_that_work_in_place(kind, eval_only):
    chain = in_place_chain(kind)
    chain.eval_only = eval_only
    lesions = [lesion.edit(chain) for lesion in rp.single_deletions(chain) + rp.duplications(chain)]
    assert_exact([chain, *lesions], inputs())
    # Also where a step without effect of its own hands the same memory on.
    aliases = chain.with_blocks([chain[0].replace(branch=None, skip=nn.Sequential()), *list(chain)[1:]])
    assert_exact([chain, rp.delete_block(aliases, 1), aliases, *lesions], inputs())


def test_a_stem_in_place_leaves_the_batch_as_it_was():
    chain = random_chain(STEADY)
    stem = nn.Sequential(nn.ReLU(inplace=True), chain.stem)
    chain = ResidualChain(stem, chain, chain.head)
    assert_exact([chain], inputs())
    assert_exact([chain, ResidualChain(stem, list(chain)[1:], chain.head)], inputs())


class Counting(nn.Module):
    calls = 0

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        self.calls += 1
        return self.part(x)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS[:4]), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_a_block_is_evaluated_once_for_each_state_that_reaches_it(edits):
    chains = chains_of(random_chain(STEADY), edits)
    # Each prefix of steps that ends in a block, told apart by what it computes.
    prefixes = set()
    for one in chains:
        with torch.inference_mode():
            state, names = one.stem(inputs()), [repr(one.stem)]
            for _, step in steps_of(one)[1:-1]:
                state = step(state)
                names.append(tuple(state.flatten().tolist()))
                prefixes.add(tuple(names))
    assert Trie(chains).block_evaluations == len(prefixes)


def test_calls_are_counted():
    plain = random_chain(STEADY)
    chain = plain.with_blocks(b.replace(branch=Counting(b.branch)) for b in plain)
    lesions = rp.random_deletions(chain, range(1, 6), 10, torch.Generator().manual_seed(0))
    trie = Trie([chain, *(lesion.edit(chain) for lesion in lesions)])
    with torch.inference_mode():
        list(trie.logits(inputs()))
        once = sum(b.branch.calls for b in chain)
        assert once == trie.block_evaluations < sum(6 - len(lesion.blocks) for lesion in lesions)
        for block in chain:
            block.branch.calls = 0
        wanted = [0, 3, 17]
        assert [i for i, _ in sorted(trie.logits(inputs(), wanted))] == wanted
        few = Trie([chain, *(lesions[i - 1].edit(chain) for i in (3, 17))])
        assert sum(b.branch.calls for b in chain) == few.block_evaluations


@settings(max_examples=20, deadline=None)
@given(EDITS, st.sets(st.integers(0, 8)))
def test_a_subset_gives_what_all_give(edits, wanted):
    chains = chains_of(random_chain(STEADY), edits)
    wanted = [i for i in wanted if i < len(chains)]
    with torch.inference_mode():
        everything = dict(Trie(chains).logits(inputs()))
        some = dict(Trie(chains).logits(inputs(), wanted))
    assert sorted(some) == sorted(wanted)
    assert all(torch.equal(some[i], everything[i]) for i in wanted)


def test_equal_chains_and_equal_edits_inside_a_branch_are_one():
    chain = random_chain(STEADY)
    inner = ResidualChain(nn.Identity(), list(chain)[:3], nn.Identity()).eval()
    outer = chain.with_blocks([*chain, Block(inner, nn.Identity(), name="outer", in_shape=(3,), out_shape=(3,))])
    assert Trie([outer, outer, rp.delete_blocks(outer, [])]).block_evaluations == 7
    inside = [edited(outer, "inside", 6, 1) for _ in range(2)]
    assert Trie([outer, *inside]).block_evaluations == 8
    assert Trie([outer, *inside, edited(outer, "inside", 6, 2)]).block_evaluations == 9
    scaled = [rp.scale_block(outer, 6, 0.5) for _ in range(2)]
    assert Trie([outer, *scaled]).block_evaluations == 8
    sums = [rp.parallel_blocks(chain, [1, 2], combine=c) for c in ("mean", "mean", "sum")]
    assert Trie([chain, *sums]).block_evaluations == 6 + 2 * 4


class Alive(TorchDispatchMode):
    """Bytes of all tensors made while it lasts: now, and at most at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


class Sine(nn.Module):
    """A branch that makes one tensor, or none."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, x):
        return x.sin_() if self.in_place else x.sin()


def most_states(num_lesions, budget=None, in_place=False):
    """States alive at once, at the most, while random deletions from 20 blocks run."""
    blocks = [Block(Sine(in_place), nn.Identity(), name=f"b{i}", in_shape=(50,), out_shape=(50,)) for i in range(20)]
    chain = ResidualChain(nn.Identity(), blocks, nn.Identity()).eval()
    generator = torch.Generator().manual_seed(0)
    lesions = rp.random_deletions(chain, range(1, 21), num_lesions // 20, generator)
    trie = Trie([chain, *(lesion.edit(chain) for lesion in lesions)])
    x = torch.randn(8, 50)
    with torch.no_grad(), Alive() as alive:
        for _ in trie.logits(x, None, budget):
            pass
    return alive.most / (x.numel() * x.element_size())


@pytest.mark.parametrize("in_place", [False, True])
def test_few_states_are_alive_at_once_whatever_the_number_of_lesions(in_place):
    for num_lesions in (1, 20, 40, 400):
        # Inside a block there are its input, what the branch makes, and the sum; beside it one is held each time that
        # the lesions still to come are halved, at the most.
        held = math.log2(num_lesions + 1)
        assert most_states(num_lesions, in_place=in_place) <= 4 + held


def test_stacked_states_are_few_as_well():
    assert most_states(400, 4 * 8) <= 1.1 * most_states(40, 4 * 8)

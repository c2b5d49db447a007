"""Greedy deletions against a loop over all blocks that are left."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.parts import Constant
from tests.chains import Plan, inputs, random_chain

STEADY = (3, tuple(Plan(3, "identity", False, False) for _ in range(5)))
TARGETS = torch.tensor([0, 2, 1, 0])


@torch.no_grad()
def loop(chain, batches, num_blocks):
    ranking = []
    for _ in range(num_blocks):
        losses = {}
        for place in set(range(len(chain))) - set(ranking):
            kept = [block for i, block in enumerate(chain) if i not in (*ranking, place)]
            losses[place] = 0.0
            for x, targets in batches:
                state = chain.stem(x)
                for block in kept:
                    state = block(state)
                losses[place] += F.cross_entropy(chain.head(state), targets, reduction="sum").item()
        ranking.append(min(losses, key=losses.__getitem__))
    return ranking


def test_each_step_deletes_the_block_that_a_loop_finds():
    chain = random_chain(STEADY)
    batches = [(inputs(), TARGETS), (inputs(4, 2), TARGETS.flip(0))]
    lesions = rp.greedy_deletions(chain, batches, 4, progress=False)
    expected = loop(chain, batches, 4)
    assert [lesion.blocks for lesion in lesions] == [tuple(sorted(expected[: i + 1])) for i in range(4)]
    best = rp.greedy_deletions(chain, batches, 1, "agreement", maximize=True, progress=False)
    frame = rp.lesion_study(chain, batches, rp.single_deletions(chain), measures=["agreement"], progress=False)
    assert best[0].blocks == (int(frame.agreement.argmax()),)


@pytest.mark.parametrize("num_blocks", [0, 6, True, 1.5])
def test_a_wrong_number_of_blocks_is_refused(num_blocks):
    with pytest.raises(rp.ResnetPathsError, match=r"num_blocks: got .*an int from 1 to 5"):
        rp.greedy_deletions(random_chain(STEADY), [(inputs(), TARGETS)], num_blocks)


def test_a_loader_that_is_read_once_is_refused():
    with pytest.raises(rp.ResnetPathsError, match=r"loader: got .*Pass list\(loader\)"):
        rp.greedy_deletions(random_chain(STEADY), iter([(inputs(), TARGETS)]), 1)


class LogOfFirst(nn.Module):
    """NaN where the first number of a state is below 50."""

    def forward(self, x):
        return x + torch.log(x[:, :1] - 50)


def chain_that_needs_a_block():
    """Without ``block1`` its logits are NaN."""
    chain = random_chain((3, tuple(Plan(3, "identity", False, False) for _ in range(4))))
    shift = chain[1].replace(branch=Constant(torch.tensor([100.0, 0, 0], dtype=torch.float64)))
    return chain.with_blocks([chain[0], shift, *list(chain)[2:]]).with_head(LogOfFirst())


@pytest.mark.parametrize("maximize", [False, True])
def test_a_block_without_which_the_loss_is_nan_is_never_the_best(maximize):
    chain, batches = chain_that_needs_a_block(), [(inputs(), TARGETS)]
    lesions = rp.greedy_deletions(chain, batches, 3, maximize=maximize, progress=False)
    ranking = []
    for _ in range(3):
        losses = {
            place: F.cross_entropy(rp.delete_blocks(chain, [*ranking, place])(inputs()), TARGETS).item()
            for place in {0, 2, 3} - set(ranking)
        }
        ranking.append((max if maximize else min)(losses, key=losses.__getitem__))
    assert [lesion.blocks for lesion in lesions] == [tuple(sorted(ranking[: i + 1])) for i in range(3)]
    named = r"measure: got 'cross_entropy = nan for each next block \(deleted: block\d, block\d, block\d\)'"
    with pytest.raises(rp.ResnetPathsError, match=named):
        rp.greedy_deletions(chain, batches, 4, maximize=maximize, progress=False)


def test_shapley_values_of_a_loss_that_is_nan_are_refused():
    chain = chain_that_needs_a_block()
    with pytest.raises(rp.ResnetPathsError, match=r"measure: got 'cross_entropy = nan with .*block1.* deleted'"):
        rp.sampled_shapley_values(chain, [(inputs(), TARGETS)], generator=torch.Generator(), progress=False)
    rest = rp.sampled_shapley_values(
        chain, [(inputs(), TARGETS)], blocks=[0, 2, 3], generator=torch.Generator(), progress=False
    )
    assert rest.shapley.notna().all()

"""Greedy deletions against a loop over all blocks that are left."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import resnet_paths as rp
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

"""Lesion studies of chains whose blocks read context, such as a mask, against the model without blocks."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.lesions.trie import Trie
from tests.chains import inputs
from tests.unraveling.test_carried import TARGETS, Masked, Positions, build, masks

OPTIONS = [{}, {"batch_budget": 64}, {"batch_budget": 3}, {"batch_budget": 1}, {"reestimate_batchnorm": True}]


@pytest.mark.parametrize("kind", ["float", "truth", "integer"])
def test_all_lesions_of_one_stem_share_its_context(kind):
    model, x, mask = build(Masked, kind), inputs(), masks(kind)
    chain = rp.unravel(model, (x, mask))
    batch = ((x, mask), TARGETS)
    losses = [nn.functional.cross_entropy(model(x, mask, without=(i,)), TARGETS).item() for i in range(3)]
    for options in OPTIONS:
        if "reestimate_batchnorm" in options:  # there is none: the numbers stay
            options = {"reestimate_batchnorm": [batch]}
        frame = rp.lesion_study(chain, [batch], rp.single_deletions(chain), progress=False, **options)
        assert frame.cross_entropy.tolist() == pytest.approx(losses, rel=1e-12)
    copied = pickle.loads(pickle.dumps(chain))
    assert copied.context_names == chain.context_names
    with ThreadPoolExecutor(2) as executor:
        frame = rp.lesion_study(copied, [batch] * 3, rp.single_deletions(copied), executor=executor, progress=False)
    assert frame.cross_entropy.tolist() == pytest.approx(losses, rel=1e-12)


class Counting(nn.Module):
    """A branch that records how many examples it reads."""

    reads_context = ("mask",)

    def __init__(self):
        super().__init__()
        self.linear, self.sizes = nn.Linear(3, 3), []

    def forward(self, x, mask):
        self.sizes.append(len(x))
        return torch.tanh(self.linear(x)) * mask


class Stem(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.linear, self.rows = nn.Linear(5, 3), rows

    def forward(self, x):
        return self.linear(x), torch.sigmoid(x[: self.rows, :3])


@pytest.mark.parametrize("rows", [4, 1])
def test_states_are_stacked_with_their_context(rows):
    """A row per example is stacked, also of different stems; one row for all examples stays."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [Block(Counting(), nn.Identity(), name=f"b{i}", in_shape=(3,), out_shape=(3,)) for i in range(4)]
        chain = ResidualChain(Stem(rows), blocks, nn.Linear(3, 3), ("mask",)).double().eval()
        other = ResidualChain(Stem(rows).double().eval(), chain, chain.head, ("mask",))
    x = inputs(4, 2)
    chains = [chain, *(rp.delete_block(each, i) for each in (chain, other)[:rows] for i in range(4))]
    with torch.inference_mode():
        alone = [one(x) for one in chains]
        for block in blocks:
            block.branch.sizes.clear()
        found = dict(Trie(chains).logits(x, None, 64))
    assert sorted(found) == list(range(len(chains)))
    for index, logits in found.items():
        torch.testing.assert_close(logits, alone[index], rtol=1e-12, atol=1e-12)
    assert max(size for block in blocks for size in block.branch.sizes) > 4


def test_one_row_for_all_examples_stays_one_row():
    model = build(Positions)
    tokens = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0))
    chain = rp.unravel(model, {"tokens": tokens, "positions": torch.arange(6)[None]})
    batch = {"tokens": tokens, "positions": torch.arange(6)[None], "labels": TARGETS}
    frames = [
        rp.lesion_study(chain, [batch], rp.single_deletions(chain), batch_budget=budget, progress=False)
        for budget in (None, 64, 2)
    ]
    for frame in frames:
        for i, loss in enumerate(frame.cross_entropy):
            logits = rp.delete_block(chain, i)(tokens=tokens, positions=torch.arange(6)[None])
            assert loss == pytest.approx(nn.functional.cross_entropy(logits, TARGETS).item(), rel=1e-12)

"""Blocks written by hand whose parts work in place, against the same blocks without operations in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.core.parts import LinearCombination, Parallel
from tests.chains import Plan, inputs, random_model


class Halved(nn.Module):
    """A part of a user, of which it is not known what it does to its input."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(0.5) if self.inplace else x * 0.5


def part(inplace):
    return nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(4, 4))


BRANCHES = {
    "first of the branch": part,
    "of unknown code": lambda inplace: nn.Sequential(Halved(inplace), nn.Linear(4, 4)),
    "of several branches": lambda inplace: Parallel([part(inplace), part(inplace), nn.Linear(4, 4)]),
    "onto the skip": lambda inplace: Parallel([part(inplace), nn.Linear(4, 4), part(inplace)], onto_skip=True),
    "combined": lambda inplace: LinearCombination([part(inplace), nn.Linear(4, 4)], [2.0, -0.5]),
    "chain": lambda inplace: ResidualChain(
        nn.ReLU(inplace), [Block(part(inplace), nn.Identity(), name="inner")], nn.Identity()
    ),
}


def chain_of(make, inplace, skip=nn.Identity):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [
            Block(make(inplace), skip(), name=f"b{i}", post=nn.ReLU(inplace), in_shape=(4,), out_shape=(4,))
            for i in range(3)
        ]
        return ResidualChain(nn.Linear(5, 4), blocks, nn.Linear(4, 3)).double().eval()


@pytest.fixture(params=BRANCHES)
def pair(request):
    return tuple(chain_of(BRANCHES[request.param], inplace) for inplace in (True, False))


def by_hand(chain, x):
    """The docstring of a block, written out: each part gets a state of its own."""
    x = chain.stem(x)
    for block in chain:
        total = x
        for branch in block.branches:
            total = total + branch(x.clone())
        x = block.post(total)
    return chain.head(x)


def test_a_block_adds_its_branch_to_what_it_was_given(pair):
    in_place, plain = pair
    state = in_place.stem(inputs()).detach()
    kept = state.clone()
    in_place[0](state)
    assert torch.equal(state, kept)
    torch.testing.assert_close(in_place(inputs()), plain(inputs()), rtol=0, atol=0)
    torch.testing.assert_close(in_place(inputs()), by_hand(in_place, inputs()), rtol=0, atol=1e-14)
    output, cache = in_place.run_with_cache(inputs())
    torch.testing.assert_close(output, plain(inputs()), rtol=0, atol=1e-14)
    for index in range(3):
        torch.testing.assert_close(cache.skip[index], cache.state[index], rtol=0, atol=0)
        torch.testing.assert_close(cache.branch[index], plain[index].branch(cache.state[index]), rtol=0, atol=1e-14)


def test_a_skip_may_work_in_place_too():
    in_place, plain = (chain_of(part, inplace, lambda inplace=inplace: nn.ReLU(inplace)) for inplace in (True, False))
    assert torch.equal(in_place(inputs()), plain(inputs()))


def test_all_instruments_agree_on_it(pair):
    in_place, plain = pair
    x, y = inputs(), torch.tensor([0, 1, 2, 1])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(in_place(leaf), y, reduction="sum"), leaf)
    shares = rp.gradient_by_path_length(in_place, x, y, progress=False)
    assert shares.summed_path_gradient_norm.tolist() == pytest.approx(
        rp.gradient_by_path_length(plain, x, y, progress=False).summed_path_gradient_norm.tolist(), abs=1e-12
    )
    state = in_place.stem(x).detach().requires_grad_()
    after = state.clone()
    for block in in_place:
        after = block(after)
    (at_stem,) = torch.autograd.grad(F.cross_entropy(in_place.head(after), y, reduction="sum"), state)
    depth = rp.gradient_by_depth(in_place, x, y, progress=False)
    assert depth.gradient_norm[0] == pytest.approx(at_stem.norm(dim=1).mean().item(), abs=1e-12)
    torch.testing.assert_close(gradient, at_stem @ in_place.stem.weight)
    norms, expected = rp.block_norms(in_place, x), rp.block_norms(plain, x)
    for column in ("input_norm", "skip_norm", "branch_norm", "sum_norm"):
        assert norms[column].tolist() == pytest.approx(expected[column].tolist(), abs=1e-12), column
    account = rp.deletion_account(in_place, x, output=lambda logits: logits[:, 0], progress=False)
    change = [(rp.delete_block(in_place, i)(x) - in_place(x))[:, 0].mean().item() for i in range(3)]
    assert account.total_effect.tolist() == pytest.approx(change, abs=1e-12)
    frame = rp.lesion_study(in_place, [(x, y)], rp.single_deletions(in_place), device="cpu", progress=False)
    assert frame.intact_cross_entropy[0] == pytest.approx(F.cross_entropy(plain(x), y).item(), abs=1e-12)
    losses = [F.cross_entropy(rp.delete_block(plain, i)(x), y).item() for i in range(3)]
    assert frame.cross_entropy.tolist() == pytest.approx(losses, abs=1e-12)


def test_exported_parts_are_given_no_copies(monkeypatch):
    """What was read from a model never works in place."""
    model = random_model((3, tuple(Plan(3, "identity", True, False) for _ in range(3))))
    chain = rp.group_blocks(rp.unravel(model, inputs()), [[1, 2]])
    edited = rp.delete_block(rp.scale_block(chain, 0, 0.5), 0)
    x, expected = inputs(), model(inputs())
    copied = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor, **options: copied.append(tensor))
    assert torch.equal(chain(x), expected)
    assert torch.equal(chain.run_with_cache(x)[0], expected)
    edited(x)
    assert not copied

"""Singular triplets and alignment of branch Jacobians against dense Jacobians by torch.func.jacrev."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.gradients.gradient_reference import Recipe, batch, build, seeded
from tests.predictions.plain_networks import made


def dense(chain, inputs):
    """The Jacobian of each branch at each example, [example, output, input], by torch.func."""
    found, state = [], chain.stem(inputs).detach()
    for block in chain:
        parts = [block.pre, block.branch]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            each = [torch.func.jacrev(lambda x: parts[1](parts[0](x[None])))(one) for one in state]  # noqa: B023
        found.append(torch.stack([j.reshape(int(np.prod(j.shape[: -(state.dim() - 1)])), -1) for j in each]))
        state = block(state).detach()
    return found


@pytest.mark.parametrize("name", ["resnet", "vit", "chain"])
def test_singular_triplets_equal_those_of_the_dense_jacobian(name):
    if name == "chain":
        recipes = (Recipe(3, "identity", pre=True), Recipe(4, "projection"), Recipe(4, "identity", branch=2, post=True))
        chain, inputs = build(recipes, 3), batch(3)[0]
    else:
        _, chain, inputs = made(name)
        inputs = inputs[:2]
    rank = 4
    svd = rp.jacobian_svd(chain, inputs, rank=rank, tolerance=1e-12, max_iterations=200)
    for index, jacobian in enumerate(dense(chain, inputs)):
        left, values, right = torch.linalg.svd(jacobian)
        found = svd.values[index]
        num = found.shape[1]
        assert num == min(rank, *jacobian.shape[1:])
        torch.testing.assert_close(found, values[:, :num], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(jacobian @ svd.right[index], svd.left[index] * found[:, None], rtol=0, atol=1e-9)
        for vectors in (svd.left[index], svd.right[index]):
            torch.testing.assert_close(vectors.mT @ vectors, torch.eye(num).expand(len(inputs), -1, -1).double())
        # The first vectors up to a sign, where the first value is simple.
        apart = values[:, 0] - values[:, 1] > 1e-3 * values[:, 0]
        for vectors, exact in ((svd.left[index], left), (svd.right[index], right.mT)):
            cosines = (vectors[..., 0] * exact[..., 0]).sum(1).abs()
            torch.testing.assert_close(cosines[apart], torch.ones_like(cosines[apart]))


def test_residuals_bound_the_errors_of_an_early_stop():
    _, chain, inputs = made("resnet")
    svd = rp.jacobian_svd(chain, inputs, rank=3, tolerance=0, max_iterations=3)
    for index, jacobian in enumerate(dense(chain, inputs)):
        exact = torch.linalg.svdvals(jacobian)
        bound = svd.residuals[index] * svd.values[index][:, :1]
        nearest = (svd.values[index][:, :, None] - exact[:, None]).abs().amin(2)
        assert (nearest <= bound + 1e-12).all()
        num_out, num_in = jacobian.shape[1:]
        pulled = jacobian.mT @ svd.left[index] - svd.right[index] * svd.values[index][:, None]
        pushed = jacobian @ svd.right[index] - svd.left[index] * svd.values[index][:, None]
        residual = (pulled if num_out >= num_in else pushed).norm(dim=1)
        torch.testing.assert_close(bound, residual)
    frame = svd.to_frame()
    assert frame.residual.max() > 1e-3
    assert (rp.jacobian_svd(chain, inputs, rank=3).to_frame().residual <= 1e-3).all()


def test_jacobians_of_low_rank():
    with seeded(1):
        wide_, narrow = nn.Linear(2, 12, bias=False), nn.Linear(12, 2, bias=False)
        zero = nn.Linear(12, 12)
        nn.init.zeros_(zero.weight)
        branches = [nn.Sequential(narrow, wide_), zero]
        blocks = [Block(branch, nn.Identity(), name=f"b{i}") for i, branch in enumerate(branches)]
        chain = ResidualChain(nn.Identity(), blocks, nn.Identity()).double().eval()
    svd = rp.jacobian_svd(chain, torch.zeros(1, 12).double(), rank=3, tolerance=1e-10)
    expected = torch.linalg.svdvals(wide_.weight @ narrow.weight)[:3]
    torch.testing.assert_close(svd.values[0][0], expected, atol=1e-12, rtol=0)
    assert not svd.values[1].any()
    frame = svd.to_frame()
    assert frame.relative_singular_value.isna().tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize(("num_in", "num_out"), [(9, 1), (9, 2), (12, 5), (2, 9), (5, 5)])
@pytest.mark.parametrize("rank", [1, 3])
def test_branches_of_few_outputs_or_inputs(num_in, num_out, rank):
    """The space of the smaller side is filled after a few iterations; a random start in the larger one is no answer."""
    with seeded(5):
        stem, branch, skip = nn.Linear(3, num_in), nn.Linear(num_in, num_out), nn.Linear(num_in, num_out)
        block = Block(nn.Sequential(branch, nn.Tanh()), skip, name="block")
        chain = ResidualChain(stem, [block], nn.Linear(num_out, 2)).double().eval()
        inputs = torch.randn(4, 3).double()
    svd = rp.jacobian_svd(chain, inputs, rank=rank, tolerance=1e-10, max_iterations=100)
    (jacobian,) = dense(chain, inputs)
    least = min(rank, num_in, num_out)
    torch.testing.assert_close(svd.values[0], torch.linalg.svdvals(jacobian)[:, :least], rtol=1e-9, atol=1e-12)
    assert (svd.residuals[0] <= 1e-10).all()


def test_alignment_equals_the_formula():
    _, chain, inputs = made("resnet")
    svd = rp.jacobian_svd(chain, inputs, rank=3, tolerance=1e-10, max_iterations=100)
    exact = [torch.linalg.svd(jacobian) for jacobian in dense(chain, inputs)]
    order = [1, 2, 3, 0]
    for frame, other in (
        (rp.residual_alignment(svd), range(4)),
        (rp.residual_alignment(svd, svd.examples(order)), order),
    ):
        rows = frame.set_index(["block_index", "other_index"])
        # Blocks 0 and 1 work on 4x8x8, block 3 on 6x4x4, block 2 leads from one to the other.
        pairs = {(i, j) for i in range(4) for j in range(4)}
        assert set(rows.index) == pairs - {(3, 0), (3, 1), (0, 3), (1, 3)}
        for (i, j), row in rows.iterrows():
            u, v = exact[i][0][..., :3], exact[j][2].mT[list(other)][..., :3]
            if u.shape[1] == v.shape[1]:
                products = u.mT @ v
                each = products.square().sum((1, 2)) / 3
                assert row.left_right == pytest.approx(each.mean().item(), abs=1e-6)
                assert row.left_right_se == pytest.approx(each.std().item() / 2, abs=1e-6)
                assert row.leading_cosine == pytest.approx(products[:, 0, 0].abs().mean().item(), abs=1e-6)
            else:
                assert np.isnan(row.left_right)
                assert np.isnan(row.leading_cosine)
    own = rp.residual_alignment(svd, num_vectors=2).set_index(["block_index", "other_index"])
    assert own.left_left[0, 0] == pytest.approx(1)
    assert own.right_right[3, 3] == pytest.approx(1)
    assert own.random_alignment[3, 3] == pytest.approx(2 / 96)


def test_batches_and_parts_of_batches_change_nothing():
    chain, inputs = build((Recipe(4, "projection"), Recipe(4, "identity")), 4), batch(6)[0]
    whole = rp.jacobian_svd(chain, inputs, rank=2, tolerance=1e-12)
    loader = [(inputs[:2], None), (inputs[2:], None)]
    parts = rp.jacobian_svd(chain, loader, rank=2, tolerance=1e-12, memory_budget=1000, progress=False)
    assert parts.num_examples == 6
    for one, other in zip(whole.values, parts.values, strict=True):
        torch.testing.assert_close(one, other)


def test_blocks_without_a_branch_are_left_out():
    chain, inputs = build((Recipe(3, "identity"),) * 3, 4), batch(2)[0]
    assert rp.jacobian_svd(rp.delete_block(chain, 1), inputs).block_index == (0, 2)
    with pytest.raises(rp.ResnetPathsError, match="no branch"):
        rp.jacobian_svd(rp.delete_blocks(chain, [0, 1, 2]), inputs)


def test_refusals():
    chain, inputs = build((Recipe(3, "identity"),) * 3, 4), batch(2)[0]
    svd = rp.jacobian_svd(chain, inputs, rank=2)
    for arguments, message in [
        ((chain,), "svd: got 'ResidualChain'"),
        ((svd, svd.examples([0])), "other: got '3 blocks, 1 examples'"),
    ]:
        with pytest.raises(rp.ResnetPathsError, match=message):
            rp.residual_alignment(*arguments)
    with pytest.raises(rp.ResnetPathsError, match="num_vectors: got 3"):
        rp.residual_alignment(svd, num_vectors=3)

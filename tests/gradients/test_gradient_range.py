"""Gradients far outside the range of their dtype are as accurate as others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.gradients.gradient_reference import (
    assert_close,
    batch,
    seeded,
)

gradients_of = rp.gradient_by_path_length


class Slope(nn.Module):
    """Zero, with this derivative: gradients of any size over states of an ordinary one."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, slope):
            ctx.slope = slope
            return torch.zeros_like(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.slope, None

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return self.Function.apply(x, self.slope)


def chain_of_slopes(slope, nested=False):
    """64 blocks: G_k is C(64, k) slope^k times the gradient of the path of skips."""
    blocks = [Block(Slope(slope), nn.Identity(), name=f"{i}") for i in range(64)]
    if nested:
        blocks = [Block(ResidualChain(nn.Identity(), blocks, nn.Identity()), None, name="all")]
    return ResidualChain(nn.Linear(5, 3), blocks, nn.Linear(3, 3)).eval()


def log(values):
    return np.log(np.where(np.asarray(values, float) > 0, values, 1))


@pytest.mark.parametrize(("slope", "nested"), [(1e-4, False), (1e-4, True), (1e3, False), (1e-7, False)])
def test_the_range_of_the_dtype_is_no_limit(slope, nested):
    chain, (inputs, targets) = chain_of_slopes(slope, nested), batch(1)
    lengths = np.arange(65)
    counts = np.array([math.log(math.comb(64, k)) for k in range(65)])
    energies = []
    for dtype, tolerance in ((torch.float16, 0.1), (torch.float32, 1e-5), (torch.float64, 1e-12)):
        if slope == 1e-7 and dtype == torch.float16:
            continue  # one step alone leaves its range
        exact, sampled, energy = (
            gradients_of(chain.to(dtype), inputs.to(dtype), targets, method=method, num_draws=2, per_example=False)
            for method in ("exact", "sampled", "energy")
        )
        first = exact.summed_path_gradient_norm[0]
        of_paths = lengths * math.log(slope) + math.log(first)
        for frame, name, expected in (
            (exact, "summed_path_gradient_norm", of_paths + counts),
            (sampled, "mean_path_gradient_norm", of_paths),
            (sampled, "total_gradient_magnitude", of_paths + counts),
        ):
            size = of_paths if frame is sampled else expected
            holds = size > math.log(1e-300)
            assert abs(log(frame[name]) - expected)[holds].max() < tolerance
            # What even a float64 cannot hold is told apart from what is nothing.
            assert not frame.underflowed[holds].any()
            assert frame.underflowed[size < math.log(5e-324) - 1].all()
            assert frame.underflowed.any() == (slope == 1e-7)
        shares = counts + lengths * math.log(slope) - 64 * math.log1p(slope)
        assert_close(exact.gradient_share, np.exp(shares), 10 * tolerance)
        assert ((energy.rms_path_gradient_norm > 0) != energy.underflowed).all()
        energies.append(energy.rms_path_gradient_norm[abs(of_paths + counts) < math.log(1e150)] / first)
    np.testing.assert_allclose(*energies[-2:], rtol=1e-4)


def test_populations_hold_numbers_of_any_range():
    """Norms of 1e-4 to the power of the length, in float32."""
    chain, (inputs, targets) = chain_of_slopes(1e-4, False).float(), batch(1)
    frame = gradients_of(chain, inputs.float(), targets, method="sampled", num_draws=70)
    expected = np.arange(65) * math.log(1e-4) + math.log(frame.mean_path_gradient_norm[0])
    known = frame.mean_path_gradient_norm > 0
    assert known.sum() > 10
    found, error = frame.mean_path_gradient_norm[known], frame.mean_path_gradient_norm_se[known]
    assert (abs(np.exp(log(found) - expected[known]) - 1) <= 5 * error / found + 1e-4).all()


@pytest.mark.parametrize("kind", ["deleted", "skips alone", "pre and post"])
def test_no_part_of_a_block_loses_small_gradients(kind):
    """Thirty blocks whose skips, or whose pre and post, multiply gradients by a thousandth."""

    def small():
        linear = nn.Linear(3, 3)
        nn.init.orthogonal_(linear.weight, 1e-3)
        return linear

    with seeded():
        parts = {
            "deleted": lambda: {"branch": None, "skip": small()},
            "skips alone": lambda: {"branch": nn.Linear(3, 3), "skip": small()},
            "pre and post": lambda: {"branch": nn.Linear(3, 3), "skip": nn.Identity(), "pre": small(), "post": small()},
        }[kind]
        chain = ResidualChain(nn.Linear(5, 3), [Block(**parts(), name=f"{i}") for i in range(30)], nn.Linear(3, 3))
    inputs, targets = batch()
    limit = 0 if kind == "skips alone" else None
    single = gradients_of(chain.eval(), inputs.float(), targets, max_length=limit)
    double = gradients_of(chain.double(), inputs, targets, max_length=limit)
    assert double.summed_path_gradient_norm[0] < 1e-80
    for name in ("summed_path_gradient_norm", "gradient_share"):
        np.testing.assert_allclose(single[name], double[name], rtol=1e-3)

"""Gradients far outside the range of their dtype are as accurate as others."""

from __future__ import annotations

import fractions
import math

import numpy as np
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from resnet_paths.gradients.measurements import _times
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


def chain_of_one_number(slope, num_blocks=2):
    """Path gradients are powers of the slope: its branches are `slope` times a state of one number."""
    layers = [nn.Linear(1, 1, bias=False).double() for _ in range(num_blocks)]
    for layer in layers:
        nn.init.constant_(layer.weight, slope)
    blocks = [Block(layer, nn.Identity(), name=f"{i}") for i, layer in enumerate(layers)]
    return ResidualChain(nn.Identity(), blocks, nn.Identity()).eval()


def gradients_of_one_number(factors, slope, **options):
    """Where the gradient of example i is ``factors[i]`` times that of the chain."""
    losses = torch.tensor(factors).double()
    inputs = torch.zeros(len(factors), 1).double()
    return gradients_of(chain_of_one_number(slope), inputs, loss=lambda y, _: y[:, 0] * losses, **options)


def test_an_example_beyond_the_range_is_not_left_out():
    frame = gradients_of_one_number([1.0, 1e10], 1e150)
    assert frame.summed_path_gradient_norm.tolist() == pytest.approx([(1 + 1e10) / 2, (1 + 1e10) * 1e150, np.inf])
    assert np.isnan(frame.summed_path_gradient_norm_se[2])
    # Shares are ratios, which a float can hold.
    assert frame.gradient_share.tolist() == pytest.approx([0, 2e-150, 1], abs=1e-12)
    by_depth = rp.gradient_by_depth(
        chain_of_one_number(1e160), torch.zeros(2, 1).double(), loss=lambda y, _: y[:, 0], progress=False
    )
    assert by_depth.gradient_norm.tolist() == pytest.approx([np.inf, 1e160, 1.0])


@pytest.mark.parametrize("value", [1.0, 0.7, 1e-300, 5e-324, 1e300, 0.0])
def test_a_total_is_the_product_of_mean_and_count(value):
    """Against fractions; infinite beyond the range of floats."""
    for count in (3, math.comb(54, 27), math.comb(1025, 512), 2**1023, 2**1024, math.comb(3000, 900)):
        exact = fractions.Fraction(value) * count
        held = exact <= fractions.Fraction(np.finfo(float).max)
        assert _times(value, count) == pytest.approx(float(exact) if held else math.inf, rel=1e-15)
    assert _times(math.inf, 7) == math.inf
    assert math.isnan(_times(math.nan, 7))


@pytest.mark.parametrize("paths", ["weighted", "uniform", "signs"])
@pytest.mark.parametrize("slope", [1e-60, 1e-90, 1.0, 1e70])
def test_errors_are_those_of_numbers_of_ordinary_size(paths, slope):
    """Numbers of paths of length 2 are slope^2 times what they are for a slope of 1."""
    method = "energy" if paths == "signs" else "sampled"
    options = {"method": method, "paths": paths, "num_draws": 6, "max_length": 2}
    frame, ordinary = (gradients_of_one_number([1.0, 2.0, 5.0], each, **options) for each in (slope, 1.0))
    size = slope**2
    names = [name for name in ordinary.columns if "norm" in name or "magnitude" in name]
    assert any(name.endswith("examples_se") for name in names)
    for name in names:
        if paths == "signs" and name.startswith("rms") and size < 1e-154:  # the square is too small
            assert frame.underflowed[2]
        else:
            np.testing.assert_allclose(frame[name][2] / size, ordinary[name][2], rtol=1e-6, atol=1e-9, err_msg=name)


def test_squares_of_few_digits_are_told():
    """The mean of squares of about 1e-322 has two digits: the coherence with signs is off by as much."""
    frame = gradients_of_one_number([1.0, 1.3], 1e-161, method="energy", paths="signs", num_draws=50)
    assert frame.underflowed.tolist() == [False, True, True]
    assert frame.coherence[0] == pytest.approx(1)

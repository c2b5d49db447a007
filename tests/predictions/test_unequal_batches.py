"""Examples with different numbers of positions, in batches of their own, against plain PyTorch on each example."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import resnet_paths as rp
from resnet_paths.core.chain import Block, ResidualChain
from tests.gradients.gradient_reference import seeded

LENGTHS = (60, 1, 1, 2, 1, 1, 3)


def tokens_and_chain():
    """A chain on each token apart, and examples of `LENGTHS` tokens, each a batch."""
    with seeded(3):
        blocks = [Block(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Identity(), name=f"b{i}") for i in range(3)]
        chain = ResidualChain(nn.Identity(), blocks, nn.Linear(4, 4)).double().eval()
        loader = [(torch.randn(1, n, 4).double() / 3, torch.randint(4, (1, n))) for n in LENGTHS]
    return chain, loader


def mean_of_means(values):
    """Of one tensor of positions for each example."""
    return float(np.mean([each.double().mean().item() for each in values]))


def test_rates_are_means_over_examples_within_their_intervals():
    chain, loader = tokens_and_chain()
    iterative = rp.iterative_inference(chain, loader, progress=False)
    lens = rp.lens(chain, loader, progress=False)
    for depth in range(4):
        exits = rp.delete_blocks(chain, range(depth, 3))
        predicted = [exits(x).argmax(2) for x, _ in loader]
        final = [chain(x).argmax(2) for x, _ in loader]
        agreement = mean_of_means(a == b for a, b in zip(predicted, final, strict=True))
        row = lens.iloc[depth]
        assert row.agreement == pytest.approx(agreement)
        assert row.agreement_low <= row.agreement <= row.agreement_high
        if depth:
            row = iterative.iloc[depth - 1]
            wrong = mean_of_means(a != y for a, (_, y) in zip(predicted, loader, strict=True))
            assert row.error_rate == pytest.approx(wrong)
            for name in ("error_rate", "final_share"):
                assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    # The rate over all positions, that of the long example, is another one.
    pooled = torch.cat([(chain(x).argmax(2) != y).flatten() for x, y in loader]).double().mean().item()
    assert abs(pooled - iterative.error_rate.iloc[-1]) > 0.02


def test_the_ends_of_bars_are_those_of_the_intervals():
    chain, loader = tokens_and_chain()
    iterative, lens = (f(chain, loader, progress=False) for f in (rp.iterative_inference, rp.lens))
    for draw, frame, name in (
        (rp.figures.plot_iterative_inference, iterative, "error_rate"),
        (rp.figures.plot_lens, lens, "agreement"),
    ):
        fig, ax = plt.subplots()
        draw(frame, ax, name)
        ends = [segment[:, 1] for segment in ax.collections[0].get_segments()]
        np.testing.assert_allclose(ends, 100 * frame[[f"{name}_low", f"{name}_high"]], atol=1e-9)
        with pytest.raises(ValueError, match="negative"):  # a rate outside of its interval is not drawn as another one
            draw(frame.assign(**{f"{name}_low": frame[name] + 0.1}), ax, name)
        plt.close(fig)


def test_relative_changes_are_means_over_examples():
    chain, loader = tokens_and_chain()
    frame = rp.effect_matrix(chain, loader, output=lambda outputs: outputs.mean((1, 2)), progress=False)
    without = rp.delete_block(chain, 0)
    ratios = []
    for x, _ in loader:
        intact, after = chain[1].branch(chain[0](x)), without[1].branch(x)
        ratios.append((after - intact).norm(dim=2) / intact.norm(dim=2))
    assert frame.relative_change[0] == pytest.approx(mean_of_means(ratios))
    assert frame.max_relative_change[0] == pytest.approx(max(each.max().item() for each in ratios))

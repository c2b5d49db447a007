"""Effective windows and decays, against a search over all windows and against data made with a known rate."""

from __future__ import annotations

import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_paths as rp
from resnet_paths import figures
from resnet_paths.gradients import PAPER_WINDOW, GeometricDecay, decay_factors, fit_decay


def frame_of(values, **columns):
    n = len(values) - 1
    counts = pd.Series([math.comb(n, k) for k in range(n + 1)], dtype=object)
    frame = pd.DataFrame({"path_length": range(n + 1), "num_paths": counts, "value": values, **columns})
    frame.attrs["total_num_paths"] = 2**n
    return frame


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 20), min_size=1, max_size=12), st.sampled_from([0.5, 0.95, 1.0]))
def test_no_shorter_window_holds_as_much(values, share):
    if sum(values) <= 0:
        return
    held = {(a, b): sum(values[a : b + 1]) / sum(values) for a in range(len(values)) for b in range(a, len(values))}
    enough = {window: value for window, value in held.items() if value >= share - 1e-9}
    window = rp.effective_window(frame_of(values), "value", share)
    shortest = min(b - a for a, b in enough)
    assert window.longest - window.shortest == shortest
    assert window.share == pytest.approx(max(v for (a, b), v in enough.items() if b - a == shortest))
    assert values[window.peak] == max(values)
    counts = [math.comb(len(values) - 1, k) for k in range(len(values))]
    expected = sum(counts[window.shortest : window.longest + 1]) / sum(counts)
    assert window.fraction_of_paths == pytest.approx(expected)


def test_the_papers_numbers():
    """With a decay of 0.25 a block the paper's window holds 97.5 % of the total magnitude of 54 blocks."""
    decay = GeometricDecay(0.25, 0.0, 54)
    first, last = PAPER_WINDOW
    assert decay.binomial.fraction[first : last + 1].sum() == pytest.approx(0.975, abs=5e-4)
    assert decay.binomial.fraction.sum() == pytest.approx(1)
    total = [math.comb(54, k) * 0.25**k for k in range(55)]
    np.testing.assert_allclose(decay.binomial.fraction, np.array(total) / sum(total), rtol=1e-9)
    window = rp.effective_window(rp.path_histogram(54), "fraction")
    assert (window.shortest, window.longest) == (20, 34)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_known_rate_is_found_within_its_error(weighted):
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(200):
        noise = 0.2 if not weighted else np.linspace(0.05, 0.5, 20)
        norms = 3 * 0.3 ** np.arange(20) * np.exp(noise * generator.standard_normal(20))
        columns = {"value_se": noise * norms} if weighted else {}
        decay = fit_decay(frame_of(norms, **columns), "value")
        errors.append((decay.rate - 0.3) / decay.rate_se)
    assert 0.8 < np.std(errors) < 1.25
    assert abs(np.mean(errors)) < 0.3


def test_rows_of_any_order_are_one_window():
    frame = frame_of([1.0, 8.0, 2.0, 9.0, 3.0, 0.5])
    for rows in ([5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]):
        shuffled = frame.iloc[rows]
        assert rp.effective_window(shuffled, "value", 0.7) == rp.effective_window(frame, "value", 0.7)
        norms = frame_of([0.5**k for k in range(6)]).iloc[rows]
        assert fit_decay(norms, "value").rate == pytest.approx(0.5)
        assert fit_decay(norms, "value").longest_path == 5


def test_the_fraction_of_paths_is_that_of_all_paths_or_unknown(tmp_path):
    """A file keeps no attributes: rows up to max_length do not tell how many paths there are."""
    frame = frame_of([1.0, 8.0, 2.0, 0.1, 0, 0])[:4]
    assert rp.effective_window(frame, "value").fraction_of_paths == pytest.approx((1 + 5 + 10) / 32)
    frame.to_csv(tmp_path / "frame.csv", index=False)
    assert math.isnan(rp.effective_window(pd.read_csv(tmp_path / "frame.csv"), "value").fraction_of_paths)
    histogram = rp.path_histogram(80)  # counts that no integer of a file's reader holds
    histogram.to_csv(tmp_path / "histogram.csv", index=False)
    for one in (histogram, pd.read_csv(tmp_path / "histogram.csv")):
        window = rp.effective_window(one, "fraction")
        counts = sum(math.comb(80, k) for k in range(window.shortest, window.longest + 1))
        assert window.fraction_of_paths == pytest.approx(counts / 2**80)


def test_points_without_an_error_are_left_out_of_a_weighted_fit():
    norms = np.array([7.0, *(0.5**k for k in range(1, 8))])
    errors = np.array([np.nan, *(0.1 * norms[1:])])
    assert fit_decay(frame_of(norms, value_se=errors), "value").rate == pytest.approx(0.5)
    line = np.polyfit(range(8), np.log(norms), 1)[0]  # where no point has one, none is weighed
    assert fit_decay(frame_of(norms, value_se=np.nan), "value").rate == pytest.approx(math.exp(line))


def test_lengths_and_zeros():
    norms = [0.0, *(0.5**k for k in range(1, 8)), 1e9, 1e9]
    assert fit_decay(frame_of(norms), "value", lengths=(0, 7)).rate == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rp.effective_window(frame_of([1, 2]), "valu"), r"quantity: got 'valu'; .*nearest 'value'"),
        (lambda: rp.effective_window(frame_of([1, 2]), "value", 0), r"share: got 0"),
        (lambda: rp.effective_window(frame_of([1, -2]), "value"), r"quantity: .* positive sum"),
        (lambda: rp.effective_window(frame_of([1, math.nan]), "value"), r"quantity: .* finite"),
        (lambda: rp.effective_window(frame_of([1, 2]).drop(columns="num_paths"), "value"), r"columns .*num_paths"),
        *(
            (lambda call=call: call(pd.concat([frame_of([1, 2])] * 2), "value"), r"several rows of path length 0")
            for call in (rp.effective_window, fit_decay, decay_factors)
        ),
        (
            lambda: fit_decay(frame_of([1, 0.5, 0.25, 0.1], value_se=[math.nan, 0.1, 0.1, 0.1]), "value"),
            r"at least four norms above 0; it has 3",
        ),
        (lambda: fit_decay(frame_of([1, 0.5, 0.25, 0]), "value"), r"at least four norms above 0; it has 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        call()


@pytest.fixture(scope="module")
def frames():
    chain = rp.unravel(rp.load_network("preact-resnet-20"), torch.zeros(2, 1, 28, 28))
    images = rp.load_dataset("fashion-mnist")
    x, y = torch.stack([images[i][0] for i in range(3)]), torch.tensor([images[i][1] for i in range(3)])
    drawn = {"exact": None, "energy": "signs", "sampled": "uniform"}
    return {m: rp.gradient_by_path_length(chain, x, y, method=m, paths=p, num_draws=4) for m, p in drawn.items()}


def overlapping(texts, renderer):
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_figures_draw_the_numbers_of_the_frame(frames):
    with figures.paper_style("double", aspect=0.35):
        fig, axes = plt.subplots(1, 3)
        decay = fit_decay(frames["sampled"])
        figures.plot_path_gradients(frames["sampled"], frames["energy"], ax=axes[0], decay=decay)
        assert axes[0].get_yscale() == "log"
        drawn = axes[0].containers[0].lines[0].get_ydata()
        np.testing.assert_array_equal(drawn, frames["sampled"].mean_path_gradient_norm)
        assert len(axes[0].get_legend().get_texts()) == 4
        figures.plot_effective_window(frames["exact"], "gradient_share", ax=axes[1], paper=True)
        heights = [bar.get_height() for bar in axes[1].patches if bar.get_width() == pytest.approx(0.8)]
        np.testing.assert_allclose(heights, 100 * frames["exact"].gradient_share, rtol=1e-4, atol=1e-4)
        window = rp.effective_window(frames["exact"], "gradient_share")
        texts = [text.get_text() for text in axes[1].texts]
        assert f"{window.share:.0%} at {window.shortest} to {window.longest}" in texts
        figures.plot_coherence(frames["energy"], ax=axes[2])
        fig.draw_without_rendering()
        for ax in axes:
            labels = [*ax.get_xticklabels(), ax.xaxis.label, *ax.texts]
            assert not overlapping(labels, fig.canvas.get_renderer())
            assert ax.get_xlabel() == "path length (blocks)"
            assert ax.get_ylabel()
        plt.close(fig)
    assert mpl.rcParams["font.size"] != 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.plot_path_gradients(pd.DataFrame({"path_length": [0]})), r"frames: .*mean_path_gradient_norm"),
        (
            lambda: figures.plot_path_gradients(*[frame_of([1.0], rms_path_gradient_norm=[1.0])] * 2),
            r"frames: got '2 frames with rms_path_gradient_norm'; allowed: each column of norms in one frame",
        ),
        (lambda: figures.plot_effective_window(frame_of([1.0]), "x"), r"frame: .*Missing: x"),
        (lambda: figures.plot_coherence(frame_of([1.0])), r"frame: .*Missing: coherence"),
    ],
)
def test_figures_refuse_other_frames(call, message):
    with pytest.raises(rp.ResnetPathsError, match=message):
        call()

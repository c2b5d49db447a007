"""Adaptive studies: each lesion on as many examples as its interval needs, with intervals that hold all the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import resnet_paths as rp
from resnet_paths.lesions import Precision
from resnet_paths.lesions.adaptive import levels_of_looks, narrow_lesions
from resnet_paths.lesions.measures import measures_of
from resnet_paths.lesions.results import rows_of, rows_of_study
from tests.chains import random_chain
from tests.lesions.test_lesions import STEADY, labelled

ERROR_RATE = measures_of(["error_rate"])


@pytest.fixture(scope="module")
def chain():
    return random_chain(STEADY)


@pytest.fixture(scope="module")
def batches():
    return [batch for seed in range(8) for batch in labelled(seed=seed)]


def test_bounds_are_those_of_lan_and_demets():
    """Five equal steps, two-sided 0.05, Pocock's type: as published for the programs of Reboussin et al. 2000."""
    levels = levels_of_looks(5)
    assert [*levels] == [1, 2, 3, 4, 5]
    z = stats.norm.ppf([(1 + level) / 2 for level in levels.values()])
    np.testing.assert_allclose(z, [2.4380, 2.4268, 2.4101, 2.3966, 2.3859], atol=2e-4)


@pytest.mark.parametrize("num_batches", [1, 30, 1000])
def test_all_intervals_together_hold_with_95_percent(num_batches):
    levels = levels_of_looks(num_batches)
    looks = np.array([*levels])
    assert looks[-1] == num_batches
    assert len(looks) <= 12
    generator = np.random.default_rng(0)
    steps = generator.standard_normal((40_000, len(looks))) * np.sqrt(np.diff(looks, prepend=0))
    z = np.abs(steps.cumsum(1)) / np.sqrt(looks)
    held = (z <= stats.norm.ppf((1 + np.array([*levels.values()])) / 2)).all(1).mean()
    assert abs(held - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 40_000)


@pytest.mark.parametrize("rate", [0.0, 0.002, 0.02, 0.2])
def test_coverage_where_studies_stop(rate):
    """Many lesions of an intact network that is always right, each wrong on a share of the images."""
    generator = np.random.default_rng(1)
    num, precision = 400, Precision(0.02)
    batches = []
    for _ in range(64):
        wrong = generator.random((1 + num, 50)) < rate
        wrong[0] = False
        counts = wrong.astype(np.uint8)
        batches.append({"error_rate": np.stack([counts, np.ones_like(counts)], 2), "not finite": 0 * counts[..., None]})
    wanted, held, spent = list(range(1, 1 + num)), 0, 0
    for look, level in levels_of_looks(64).items():
        so_far = [rows_of(batch, [0, *wanted]) for batch in batches[:look]]
        stopped = wanted if look == 64 else narrow_lesions(so_far, wanted, precision, ERROR_RATE, level)
        if not stopped:
            continue
        rows = rows_of_study([rows_of(batch, [0, *stopped]) for batch in batches[:look]], ERROR_RATE, level=level)[1:]
        held += sum(row["error_rate_increase_low"] <= rate <= row["error_rate_increase_high"] for row in rows)
        spent += 50 * look * len(stopped)
        wanted = [lesion for lesion in wanted if lesion not in stopped]
    assert not wanted
    assert held / num >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / num)
    if rate <= 0.02:
        assert spent < 3200 * num / 3


@pytest.mark.parametrize("half_width", [0.065, 0.08])
def test_each_lesion_is_measured_on_the_first_batches(chain, batches, half_width):
    lesions = rp.single_deletions(chain)
    frame = rp.lesion_study(chain, batches, lesions, stop_when=Precision(half_width), per_example=True, progress=False)
    looks = levels_of_looks(len(batches))
    sizes = np.cumsum([len(labels) for _, labels in batches])
    assert len({*frame.num_examples}) > 1
    assert (frame.num_examples == sizes[-1]).any() == (half_width == 0.065)
    for lesion, (_, row) in zip(lesions, frame.iterrows(), strict=True):
        num_batches = int(np.searchsorted(sizes, row.num_examples)) + 1
        assert row.interval_level == looks[num_batches]
        alone = rp.lesion_study(chain, batches[:num_batches], [lesion], per_example=True, progress=False).iloc[0]
        for name in ("error_rate", "error_rate_increase", "intact_error_rate", "cross_entropy", "num_examples"):
            assert row[name] == pytest.approx(alone[name], rel=1e-12)
        assert (row.error_rate_per_example == alone.error_rate_per_example).all()
        assert row.error_rate_increase_low < alone.error_rate_increase_low  # a higher level
        assert row.error_rate_increase_high > alone.error_rate_increase_high
        half = (row.error_rate_increase_high - row.error_rate_increase_low) / 2
        assert half <= half_width or num_batches == len(batches)


def test_executors_and_stores_give_the_same_frame(chain, batches, tmp_path):
    options = {"stop_when": Precision(0.08, "error_rate"), "progress": False}
    expected = rp.lesion_study(chain, batches, rp.single_deletions(chain), **options)
    with ThreadPoolExecutor(3) as executor:
        threaded = rp.lesion_study(chain, batches, rp.single_deletions(chain), executor=executor, **options)
    pd.testing.assert_frame_equal(threaded, expected)
    for found in (0, expected.attrs["batches_computed"]):
        stored = rp.lesion_study(chain, batches, rp.single_deletions(chain), store=tmp_path, **options)
        pd.testing.assert_frame_equal(stored, expected)
        assert stored.attrs["batches_found"] == found


def test_a_study_ends_with_its_last_lesion(chain, batches):
    frame = rp.lesion_study(
        chain, batches, rp.single_deletions(chain)[:2], stop_when=Precision(0.9), per_class=True, progress=False
    )
    assert frame.attrs["batches_computed"] < len(batches)
    assert (frame.num_examples >= 100).all()
    assert [sum(counts) for counts in frame.num_examples_per_class] == frame.num_examples.tolist()
    assert not len(rp.lesion_study(chain, batches, [], stop_when=Precision(0.9), progress=False))


def test_what_cannot_be_stopped_is_refused(chain, batches):
    lesions = rp.single_deletions(chain)
    for half_width in (0, -1, float("nan"), float("inf"), True, "1 %"):
        with pytest.raises(rp.ResnetPathsError, match=r"half_width: got .*; allowed: a positive number"):
            Precision(half_width)
    for options, message in (
        ({"stop_when": 0.01}, r"stop_when: got 0\.01; allowed: lesions\.Precision\(half_width\), or None"),
        ({"stop_when": Precision(0.1), "adjust": "holm"}, r"stop_when: got .*without adjust"),
        ({"stop_when": Precision(0.1, "margin")}, r"stop_when: got 'margin'; allowed: a measure of the study: 'error"),
    ):
        with pytest.raises(rp.ResnetPathsError, match=message):
            rp.lesion_study(chain, batches, lesions, progress=False, **options)
    with pytest.raises(rp.ResnetPathsError, match=r"loader: got 'generator'; .*Pass list\(loader\)"):
        rp.lesion_study(chain, (b for b in batches), lesions, stop_when=Precision(0.1), progress=False)

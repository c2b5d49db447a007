"""Intervals, against definitions that are solved numerically, and their coverage by enumeration and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from resnet_paths._utils.statistics import (
    adjusted_p_values,
    mean_over_examples,
    mean_over_items,
    mean_rate_interval,
    paired_rate_interval,
    rate_interval,
    studentised_interval,
)

SIZES, RATES = (100, 500, 10_000), (0, 0.001, 0.05, 0.5)


def score_bounds(changes):
    """Both differences of paired rates at which the score test has z = 1.96; the nuisance parameter by maximisation."""
    n, up, down = len(changes), int((changes > 0).sum()), int((changes < 0).sum())

    def statistic(difference):
        def loss(share):  # of items that change down; those that change up are `difference` more
            chances = np.array([share + difference, share, 1 - 2 * share - difference]).clip(1e-300)
            return -np.dot([up, down, n - up - down], np.log(chances))

        low, high = max(0.0, -difference), (1 - difference) / 2
        share = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (up - down - n * difference) / np.sqrt(n * (2 * share + difference - difference**2))

    z, estimate = stats.norm.ppf(0.975), (up - down) / n
    return (
        optimize.brentq(lambda d: statistic(d) - z, -1 + 1e-9, estimate - 1e-9, xtol=1e-12),
        optimize.brentq(lambda d: statistic(d) + z, estimate + 1e-9, 1 - 1e-9, xtol=1e-12),
    )


@pytest.mark.parametrize(("up", "down", "same"), [(7, 2, 41), (1, 0, 99), (0, 3, 20), (0, 0, 50), (12, 12, 6)])
def test_the_paired_interval_is_that_of_the_score_test(up, down, same):
    changes = np.repeat([1, -1, 0], [up, down, same])
    interval = paired_rate_interval(changes, np.ones(len(changes)))
    assert (interval.low, interval.high) == pytest.approx(score_bounds(changes), abs=2e-6)
    assert interval.low < (up - down) / len(changes) < interval.high
    z = 0 if up + down == 0 else (up - down) / np.sqrt(up + down)  # McNemar
    assert interval.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), abs=1e-12)


@pytest.mark.parametrize("count", [0, 1, 17, 50])
def test_the_interval_of_a_rate_is_wilsons(count):
    interval = rate_interval(np.arange(50) < count, np.ones(50))
    known = stats.binomtest(count, 50).proportion_ci(method="wilson")
    assert interval[:2] == pytest.approx((known.low, known.high), abs=1e-14)


def test_empty_clusters_say_nothing():
    counts, sizes = np.array([2, 0, 1, 0, 3]), np.array([4, 0, 3, 0, 5])
    assert rate_interval(counts, sizes) == rate_interval(counts[sizes > 0], sizes[sizes > 0])
    assert all(np.isnan(rate_interval(counts * 0, sizes * 0)))
    assert all(np.isnan(paired_rate_interval(counts * 0, sizes * 0)))


def test_the_interval_of_a_mean_of_rates_holds_it():
    """A large example counts no more than the others; of equal sizes it is the interval of the rate."""
    rates, sizes = np.array([0.1, 1.0, 1.0, 1.0, np.nan, 0.9]), np.array([500, 1, 1, 1, 7, 2])
    low, high, _ = mean_rate_interval(rates, sizes)
    assert low < np.nanmean(rates) < high
    pooled = rate_interval(np.nan_to_num(rates) * sizes, np.where(np.isnan(rates), 0, sizes))
    assert not pooled.low < np.nanmean(rates) < pooled.high
    counts = np.array([3, 0, 4, 1])
    assert mean_rate_interval(counts / 4, np.full(4, 4)) == rate_interval(counts, np.full(4, 4))
    assert np.isnan(mean_rate_interval(np.full(2, np.nan), np.ones(2))).all()


def test_the_size_of_independent_clusters_is_that_of_the_variance():
    """With independent items the mean of the rates has the variance p (1 - p) / N^2 times the sum of 1 / size."""
    generator = np.random.default_rng(0)
    sizes = np.tile([1, 4, 20], 200)
    widths, means = [], []
    for _ in range(300):
        rates = generator.binomial(sizes, 0.3) / sizes
        low, high, _ = mean_rate_interval(rates, sizes)
        widths.append(high - low)
        means.append(rates.mean())
    error = np.sqrt(0.21 * (1 / sizes).sum()) / len(sizes)
    assert np.std(means) == pytest.approx(error, rel=0.15)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * error, rel=0.05)


@pytest.mark.parametrize("rate", [0.1, 0.3, 1 / 3, 0.7])
def test_clusters_of_one_rate_count_as_one_item_each(rate):
    """Whatever the rounding of their sum."""
    for num in range(1, 30):
        sizes = np.full(num, 10.0)
        z2 = stats.norm.ppf(0.975) ** 2
        centre = (rate + z2 / (2 * num)) / (1 + z2 / num)
        half = np.sqrt(z2 * (rate * (1 - rate) / num + z2 / (4 * num**2))) / (1 + z2 / num)
        assert rate_interval(rate * sizes, sizes)[:2] == pytest.approx((centre - half, centre + half), abs=1e-12)


@pytest.mark.parametrize("scale", [1e-320, 2e-180, 1.0, 5e200, 5e307])
def test_means_and_errors_of_numbers_of_any_size(scale):
    values = np.array([[1.0, 3.0, np.nan, 2.5], [2.0, 2.0, 2.0, 2.0]])
    mean, error = mean_over_examples(values * scale)
    known = values[0, [0, 1, 3]]
    rounding = 1e-3 if scale == 1e-320 else 1e-12
    assert mean / scale == pytest.approx([known.mean(), 2.0], rel=rounding)
    assert error / scale == pytest.approx([known.std(ddof=1) / 3**0.5, 0.0], rel=rounding)


def test_infinite_values_are_no_missing_ones():
    mean, error = mean_over_examples(np.array([[1.0, np.inf], [np.nan, -np.inf], [np.inf, -np.inf], [np.nan, np.nan]]))
    np.testing.assert_array_equal(mean, [np.inf, -np.inf, np.nan, np.nan])
    assert np.isnan(error).all()


def test_a_single_example_has_no_error_whatever_its_items():
    for total in np.linspace(0.1, 0.9, 40):
        mean, error = mean_over_items(np.array([total, 0.0]), np.array([7, 0]))
        assert mean == pytest.approx(total / 7)
        assert np.isnan(error)


def test_the_error_of_items_is_that_of_a_ratio():
    """Against the jackknife, which it equals to first order."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 9, 400)
    sums = generator.normal(2, 1, 400) * sizes
    mean, error = mean_over_items(sums * 1e-200, sizes)
    used = sizes > 0
    left_out = (sums.sum() - sums[used]) / (sizes.sum() - sizes[used])
    jackknife = np.sqrt((used.sum() - 1) * np.var(left_out))
    assert mean * 1e200 == pytest.approx(sums.sum() / sizes.sum())
    assert error * 1e200 == pytest.approx(jackknife, rel=0.02)


def test_a_symmetric_sample_has_students_interval():
    values = np.array([-3.0, -1, 0, 1, 3]) + 2
    low, high, p = studentised_interval(2.0, (values - 2) / 5)
    known = stats.ttest_1samp(values, 0)
    assert (low, high) == pytest.approx(tuple(known.confidence_interval(0.95)), rel=1e-12)
    assert p == pytest.approx(known.pvalue, rel=1e-12)


@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.3])
def test_the_p_value_belongs_to_the_interval(shift):
    values = np.random.default_rng(0).exponential(size=40) - 1 + shift
    for edge in studentised_interval(values.mean(), (values - values.mean()) / 40)[:2]:
        assert studentised_interval(values.mean() - edge, (values - values.mean()) / 40).p_value == pytest.approx(0.05)


def test_values_that_are_equal_show_no_variance():
    assert np.isnan(studentised_interval(2.0, np.zeros(9))).all()
    low, high, p = studentised_interval(0.0, np.zeros(9))
    assert (np.isnan(low), np.isnan(high), p) == (True, True, 1.0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_an_interval_scales_with_its_statistic(scale):
    values = np.random.default_rng(1).gamma(1.0, size=30)
    low, high, p = studentised_interval(values.mean(), (values - values.mean()) / 30)
    found = studentised_interval(scale * values.mean(), scale * ((values - values.mean()) / 30))
    assert found == pytest.approx((scale * low, scale * high, p), rel=1e-9, abs=0)


def test_adjusted_p_values_by_hand():
    p = np.array([0.02, np.nan, 0.01, 0.9, 0.04])
    assert adjusted_p_values(p, "holm").tolist() == pytest.approx([0.06, np.nan, 0.04, 0.9, 0.08], nan_ok=True)
    by_hand = [0.04, np.nan, 0.04, 0.9, 0.16 / 3]
    assert adjusted_p_values(p, "fdr_bh").tolist() == pytest.approx(by_hand, nan_ok=True)


def held(expected, nominal_applies):
    """The stated coverage: 93 to 97 % where n times the rate is at least 5, never under 90 %."""
    return 0.93 <= expected <= 0.97 if nominal_applies else expected >= 0.90


def rate_coverage(n, rate):
    """Of the interval of a rate, exactly: a sum over all counts that are at all likely."""
    least, most = stats.binom.interval(1 - 1e-9, n, rate) if rate else (0, 0)
    covered = 0.0
    for count in range(int(least), int(most) + 1):
        low, high, _ = rate_interval(np.arange(n) < count, np.ones(n))
        covered += stats.binom.pmf(count, n, rate) * (low <= rate <= high)
    return covered


def paired_coverage(n, rate, share, samples=2000):
    """Of the interval of a paired difference: `rate` of items change, `share` of these up."""
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(n, [rate * share, rate * (1 - share), 1 - rate], size=samples)
    kinds, number = np.unique(drawn, axis=0, return_counts=True)
    truth, inside = rate * (2 * share - 1), 0
    for kind, times in zip(kinds, number, strict=True):
        low, high, _ = paired_rate_interval(np.repeat([1, -1, 0], kind), np.ones(n))
        assert low < high
        inside += times * (low <= truth <= high)
    return inside / samples


def mean_coverage(draw, n, truth, samples=4000):
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(samples):
        values = draw(generator, n)
        low, high, _ = studentised_interval(values.mean(), (values - values.mean()) / n)
        inside += low <= truth <= high
    return inside / samples


def clustered_coverage(rate, samples=10_000, clusters=100):
    """Of the interval of a rate over clusters of 1 to 60 items, whose own rates are drawn from a beta distribution."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(samples):
        sizes = generator.integers(1, 61, clusters)
        counts = generator.binomial(sizes, generator.beta(5 * rate, 5 * (1 - rate), clusters))
        low, high, _ = rate_interval(counts, sizes)
        inside += low <= rate <= high
    return inside / samples


@pytest.mark.slow
def test_coverage_of_the_interval_of_a_rate():
    for n in SIZES:
        for rate in RATES:
            assert held(rate_coverage(n, rate), n * rate >= 5), (n, rate)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_coverage_of_the_interval_of_a_paired_difference(share):
    for n in SIZES:
        for rate in RATES:
            assert held(paired_coverage(n, rate, share), n * rate >= 5), (n, rate)


@pytest.mark.slow
def test_coverage_of_the_interval_of_a_mean():
    for n in (100, 500):
        assert held(mean_coverage(lambda g, n: g.exponential(size=n), n, 1.0), True)
        assert held(mean_coverage(lambda g, n: g.lognormal(0, 1, size=n), n, np.exp(0.5)), False)


@pytest.mark.slow
def test_coverage_over_clusters():
    assert held(clustered_coverage(0.05), True)
    assert held(clustered_coverage(0.5), True)

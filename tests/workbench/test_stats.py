"""The statistics of paired differences, against scipy, statsmodels and simulation."""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from workbench import stats

DIFFERENCES = [0.021, 0.034, 0.008, 0.027, 0.019]


def test_interval_is_the_t_interval_by_hand():
    """The interval is the mean plus or minus the t quantile times the standard error."""
    interval = stats.paired_interval(DIFFERENCES, alpha=0.03)
    mean, error = np.mean(DIFFERENCES), np.std(DIFFERENCES, ddof=1) / np.sqrt(5)
    assert (interval.low, interval.high) == pytest.approx(mean + error * scipy_stats.t.ppf([0.015, 0.985], 4))
    assert (interval.inner_low, interval.inner_high) == pytest.approx(mean + error * scipy_stats.t.ppf([0.03, 0.97], 4))
    assert interval.p_value == pytest.approx(scipy_stats.ttest_1samp(DIFFERENCES, 0).pvalue)
    assert (interval.estimate, interval.sd, interval.n) == pytest.approx((mean, np.std(DIFFERENCES, ddof=1), 5))


@pytest.mark.parametrize("n", [2, 3, 5, 30, 200])
@pytest.mark.parametrize("alpha", [0.0005, 0.02, 0.05, 0.4])
def test_interval_and_p_agree_with_scipy(n, alpha):
    """Both intervals and the p value are those of scipy's own t test, also at two seeds and at tiny levels."""
    values = np.random.default_rng(n).normal(0.01, 0.02, n)
    interval, test = stats.paired_interval(list(values), alpha=alpha), scipy_stats.ttest_1samp(values, 0)
    outer, inner = test.confidence_interval(1 - alpha), test.confidence_interval(1 - 2 * alpha)
    assert (interval.low, interval.high) == pytest.approx(tuple(outer), rel=1e-9)
    assert (interval.inner_low, interval.inner_high) == pytest.approx(tuple(inner), rel=1e-9)
    assert interval.p_value == pytest.approx(test.pvalue, rel=1e-9)


@pytest.mark.parametrize("margin", [0.02, 0.03, 0.035, 0.04, 0.06])
def test_inner_interval_agrees_with_tost(margin):
    """The inner interval lies within the margin exactly when statsmodels' two one-sided tests reject."""
    interval = stats.paired_interval(DIFFERENCES, alpha=0.03)
    tost_p, _, _ = ttost_paired(np.array(DIFFERENCES), np.zeros(5), -margin, margin)
    assert (-margin < interval.inner_low and interval.inner_high < margin) == (tost_p < 0.03)


def test_equal_differences_have_no_p_value_and_no_warning():
    """Differences equal up to rounding give a degenerate interval, since a t test has nothing to divide by."""
    interval = stats.paired_interval([0.02, 0.02, 0.02 + 1e-16], alpha=0.05)
    assert interval.p_value is None
    assert interval.low == interval.high == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("differences", "alpha", "message"),
    [([0.1], 0.05, "at least two paired differences, got 1"), ([1, 2], 0.5, "alpha")],
)
def test_interval_refuses_what_it_cannot_compute(differences, alpha, message):
    """One pair has no interval, and alpha must leave room for both bounds."""
    with pytest.raises(ValueError, match=message):
        stats.paired_interval(differences, alpha=alpha)


@pytest.mark.parametrize("n", [5, 8, 10, 20])
@pytest.mark.parametrize("alpha", [0.02, 0.05])
def test_reachable_effect_agrees_with_statsmodels(n, alpha):
    """The smallest effect found with 80 % power is that of statsmodels, where statsmodels can compute it."""
    expected = TTestPower().solve_power(nobs=n, alpha=alpha, power=0.8)
    assert stats.reachable(n, 0.03, alpha).effect == pytest.approx(0.03 * expected, rel=2e-3)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_reachable_margin_is_reached_in_simulation(n):
    """At the smallest margin, the two one-sided tests pass in 80 % of simulated studies without a difference."""
    reachable = stats.reachable(n, 0.01, 0.05)
    samples = np.random.default_rng(3).normal(0, 0.01, (40_000, n))
    bounds = scipy_stats.ttest_1samp(samples, 0, axis=1).confidence_interval(0.9)
    passed = (bounds.low > -reachable.equivalence_margin) & (bounds.high < reachable.equivalence_margin)
    assert passed.mean() == pytest.approx(0.8, abs=0.01)


def test_reachable_effect_at_two_seeds_is_reached_in_simulation():
    """The effect is right at two seeds too, where the noncentral t of scipy is not."""
    effect = stats.reachable(2, 1.0, 0.02).effect
    samples = np.random.default_rng(4).normal(effect, 1.0, (40_000, 2))
    assert (scipy_stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.02).mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("equivalence", [False, True])
def test_seeds_needed_is_the_smallest_number_that_suffices(equivalence):
    """At the number returned the margin is within reach, and at one seed fewer it is not."""

    def reach(n):
        found = stats.reachable(n, 0.03, 0.02)
        return found.equivalence_margin if equivalence else found.effect

    needed = stats.seeds_needed(0.03, 0.02, 0.02, equivalence=equivalence)
    assert reach(needed) <= 0.02 < reach(needed - 1)


def test_seeds_needed_allows_for_a_pilot_that_was_lucky():
    """An sd from five seeds is replaced by its upper 80 % limit, 1.56 times as large."""
    limit = 0.02 * np.sqrt(4 / scipy_stats.chi2.ppf(0.2, 4))
    assert limit / 0.02 == pytest.approx(1.56, abs=0.005)
    assert stats.seeds_needed(0.02, 0.02, 0.05, pilot=5) == stats.seeds_needed(limit, 0.02, 0.05)


def test_seeds_needed_gives_up_above_two_hundred():
    """Noise ten times the margin cannot be outvoted by any number of seeds that somebody would run."""
    assert stats.seeds_needed(0.2, 0.02, 0.05) is None


def test_sign_flip_p_is_a_share_of_all_sign_patterns():
    """With six positive differences only two of 64 patterns are as extreme; below six there is no p value."""
    assert stats.sign_flip_p([0.1, 0.2, 0.3, 0.15, 0.12, 0.4]) == pytest.approx(2 / 64)
    assert stats.sign_flip_p([0.1, 0.2, 0.3, 0.15, 0.12]) is None


def test_holm_adjusts_step_by_step_in_the_order_given():
    """The smallest of three is tripled, the next doubled, and none falls below the one before it."""
    assert stats.holm([0.02, 0.01, 0.015]) == pytest.approx((0.03, 0.03, 0.03))
    assert stats.holm([0.5, 0.01]) == pytest.approx((0.5, 0.02))
    assert stats.holm([]) == ()

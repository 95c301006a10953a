"""Intervals of few repeats, against scipy's Student distribution and its own tests."""

from __future__ import annotations

import pytest
from scipy import stats

from veneer.ops import intervals


@pytest.mark.parametrize("degrees", [1, 2, 2.7, 5, 30, 400])
@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.999, 0.05])
def test_quantiles_are_students(p, degrees):
    assert intervals.quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("t", [-3.0, -0.1, 0.0, 0.5, 12.0])
@pytest.mark.parametrize("degrees", [1, 3.3, 60])
def test_the_distribution_function_is_students(t, degrees):
    assert intervals.cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), rel=1e-9, abs=1e-13)


def test_a_difference_is_welchs_test():
    first, second = [2.1, 2.4, 2.2, 2.9], [1.8, 1.81, 1.79]
    found, known = intervals.of_difference(first, second), stats.ttest_ind(first, second, equal_var=False)
    low, high = known.confidence_interval(0.95)
    assert found == pytest.approx((known.statistic * known._standard_error, low, high, known.pvalue))


def test_a_mean_has_an_interval_from_two_repeats_on():
    assert intervals.of_mean([2.0]) == (2.0, None, None, 1)
    found = intervals.of_mean([1.0, 2.0, 4.0])
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, 7 / 3, stats.sem([1, 2, 4])))
    with pytest.raises(ValueError, match="values must hold a number or more"):
        intervals.of_mean([])


def test_equal_repeats_differ_surely_or_not_at_all():
    assert intervals.of_difference([1.0, 1.0], [1.0, 1.0]) == (0, 0, 0, 1.0)
    assert intervals.of_difference([1.0, 1.0], [2.0, 2.0]) == (-1, -1, -1, 0.0)
    assert intervals.of_difference([1.0], [2.0, 3.0]) == (-1.5, None, None, None)


def test_holm_raises_p_values_in_steps():
    assert intervals.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0] and intervals.holm([]) == []

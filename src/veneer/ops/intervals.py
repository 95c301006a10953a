"""Confidence intervals of means over a few repeats, and of differences of two means (Student, Welch).

Welch 1947, The generalization of Student's problem when several different population variances are involved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, variance
from typing import NamedTuple

LEVEL = 0.95
SMALLEST = 1e-300  # keeps the continued fraction from dividing by zero


class Interval(NamedTuple):
    """A mean, or a difference of means, with its interval; low and high are None for a single repeat."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        return self._asdict()


class Difference(NamedTuple):
    """A difference of two means, its interval, and the p-value of no difference; None for single repeats."""

    mean: float
    low: float | None
    high: float | None
    p: float | None


def of_mean(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Returns the `level` interval of the mean of independent repeats. Raises ValueError without any."""
    if not values:
        raise ValueError("values must hold a number or more, got none")
    centre, n = mean(values), len(values)
    if n == 1:
        return Interval(centre, None, None, 1)
    half = quantile(0.5 + level / 2, n - 1) * math.sqrt(variance(values) / n)
    return Interval(centre, centre - half, centre + half, n)


def of_difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Difference:
    """Returns mean(first) - mean(second) with Welch's interval and two-sided p-value."""
    centre = mean(first) - mean(second)
    if min(len(first), len(second)) < 2:
        return Difference(centre, None, None, None)
    a, b = variance(first) / len(first), variance(second) / len(second)
    if not a + b:
        return Difference(centre, centre, centre, 1.0 if centre == 0 else 0.0)
    degrees = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    error = math.sqrt(a + b)
    half = quantile(0.5 + level / 2, degrees) * error
    return Difference(centre, centre - half, centre + half, 2 * (1 - cdf(abs(centre) / error, degrees)))


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for as many comparisons (Holm 1979), in the given order."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    found, largest = [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[i]))
        found[i] = largest
    return found


def quantile(p: float, degrees: float) -> float:
    """Returns the quantile of Student's t, 0 < p < 1, by bisection of its distribution."""
    if p < 0.5:
        return -quantile(1 - p, degrees)
    low, high = 0.0, 1.0
    while cdf(high, degrees) < p:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def cdf(t: float, degrees: float) -> float:
    """Returns the distribution function of Student's t (Abramowitz & Stegun 26.7.1)."""
    tail = _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5) / 2
    return 1 - tail if t > 0 else tail


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Returns the regularised I_x(a, b) (Abramowitz & Stegun 26.5.8)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):
        return math.exp(front) * _fraction(x, a, b) / a
    return 1 - math.exp(front) * _fraction(1 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    """Returns the continued fraction by Lentz's method."""
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    h = d
    for m in range(1, 500):
        before = h
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / _away(1 + factor * d), _away(1 + factor / c)
            h *= d * c
        if abs(h / before - 1) < 1e-15:
            break
    return h


def _away(value: float) -> float:
    return value if abs(value) > SMALLEST else SMALLEST

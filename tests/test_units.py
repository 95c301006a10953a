"""Bytes, counts and seconds as people read them."""

from __future__ import annotations

import pytest

from veneer.units import count, duration, size


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (637_888, "638 kB"), (2_000_000, "2 MB")]
    + [(3.21e9, "3.21 GB"), (12_345e12, "12,345 TB")],
)
def test_sizes(n, text):
    assert size(n) == text


def test_rounding_never_leaves_a_thousand_of_the_smaller_unit():
    assert [size(n) for n in (999.4, 999_499, 999_500)] == ["999 bytes", "999 kB", "1 MB"]


def test_counts():
    assert [count(n) for n in (12, 1000, 7_615_616)] == ["12", "1 k", "7.62 M"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.123 s"), (12.34, "12.3 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (61.4, "1 min 1 s")]
    + [(200, "3 min 20 s"), (239.7, "4 min 0 s"), (3599.7, "1 h 0 min"), (7800, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text

"""The interval of a ratio: that it holds what it says, on samples whose truth is known, and is the one by the
book on a mean."""

from __future__ import annotations

import math

import pytest
import torch

from veneer.ops import bootstrap
from veneer.ops.bootstrap import interval, student

# From the tables: the 97.5 % quantile of Student's t.
TABLE = {7: 2.365, 10: 2.228, 20: 2.086, 100: 1.984}


@pytest.mark.parametrize("degrees", TABLE)
def test_students_quantile_is_the_tables(degrees):
    assert student(0.975, degrees) == pytest.approx(TABLE[degrees], rel=0.01)


def test_the_interval_of_a_mean_is_the_one_by_the_book():
    """mean +- t s / sqrt(n), for a sample of a normal distribution, to the error of 4000 draws."""
    x = torch.randn(60, generator=torch.Generator().manual_seed(1)) + 3
    low, high = interval(x, torch.ones(60))
    half = 2.001 * float(x.std()) / math.sqrt(60)
    assert low == pytest.approx(float(x.mean()) - half, abs=0.1 * half) and high == pytest.approx(
        float(x.mean()) + half, abs=0.1 * half
    )


@pytest.mark.parametrize("n", [10, 40])
def test_it_holds_the_truth_as_often_as_it_says(n, monkeypatch):
    """Documents of very different length with a true difference of 0.1 bits a byte: 95 of 100 intervals
    should hold it."""
    monkeypatch.setattr(bootstrap, "DRAWS", 1000)
    draw, inside, trials = torch.Generator().manual_seed(0), 0, 300
    for trial in range(trials):
        n_bytes = torch.exp(torch.randn(n, generator=draw)) * 1000
        parts = n_bytes * (0.1 + 0.05 * torch.randn(n, generator=draw))
        low, high = interval(parts, n_bytes, seed=trial)
        inside += low <= 0.1 <= high
    assert 0.88 <= inside / trials <= 0.99


def test_it_is_the_same_for_the_same_seed_and_none_for_a_handful(monkeypatch):
    x, w = torch.rand(30), torch.rand(30) + 1
    assert interval(x, w, seed=1) == interval(x, w, seed=1) != interval(x, w, seed=2)
    assert interval(x[:7], w[:7]) is None
    low, high = interval(2 * w, w)  # the same ratio everywhere
    assert low == pytest.approx(2) and high == pytest.approx(2)
    whole = interval(x, w)
    monkeypatch.setattr(bootstrap, "AT_ONCE", 100)  # a few draws at a time change nothing
    assert interval(x, w) == whole

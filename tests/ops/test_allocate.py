"""Ranks by budget, against every combination of small menus."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.ops.allocate import Choice, heap, ilp

CHOICES = st.builds(Choice, st.integers(1, 30), st.floats(0, 10, allow_nan=False))
MENUS = st.lists(st.lists(CHOICES, min_size=1, max_size=6), min_size=1, max_size=5)


def totals(menus, chosen):
    picked = [menu[i] for menu, i in zip(menus, chosen, strict=True)]
    return sum(c.cost for c in picked), sum(c.loss for c in picked)


@settings(max_examples=60, deadline=None)
@given(menus=MENUS, extra=st.integers(0, 60))
def test_both_keep_the_budget_and_the_programme_finds_the_best(menus, extra):
    budget = sum(min(c.cost for c in menu) for menu in menus) + extra
    best = min(
        sum(c.loss for c in combination)
        for combination in itertools.product(*menus)
        if sum(c.cost for c in combination) <= budget
    )
    greedy, exact = totals(menus, heap(menus, budget)), totals(menus, ilp(menus, budget))
    assert greedy[0] <= budget and exact[0] <= budget
    assert exact[1] <= greedy[1] + 1e-12
    assert best - 1e-9 <= exact[1] <= best + 1e-5 * max(sum(max(c.loss for c in m) for m in menus), 1)


@settings(max_examples=60, deadline=None)
@given(
    spectra=st.lists(st.lists(st.floats(1e-6, 1), min_size=4, max_size=12), min_size=1, max_size=6),
    share=st.floats(0.3, 0.95),
    step=st.integers(1, 9),
)
def test_less_than_one_rank_step_is_left_of_the_budget(spectra, share, step):
    menus = []
    for spectrum in spectra:
        falling = sorted(spectrum, reverse=True)
        menus.append([Choice(step * r, sum(falling[r:])) for r in range(1, len(falling) + 1)])
    budget = max(sum(m[0].cost for m in menus), int(share * sum(m[-1].cost for m in menus)))
    for allocate in (heap, ilp):
        chosen = allocate(menus, budget)
        spent, _ = totals(menus, chosen)
        full = all(i == len(m) - 1 for m, i in zip(menus, chosen, strict=True))
        assert spent <= budget and (full or budget - spent < step)


def test_a_layer_that_suffers_most_stays_dense():
    steep = [Choice(1, 100.0), Choice(2, 90.0), Choice(4, 0.0)]
    flat = [Choice(1, 1.0), Choice(2, 0.5), Choice(4, 0.0)]
    for allocate in (heap, ilp):
        assert allocate([steep, flat], 5) == [2, 0]


def test_a_budget_below_the_cheapest_choices_is_refused():
    with pytest.raises(ConfigError, match="must be at least 7; raise keep"):
        heap([[Choice(3, 0.0)], [Choice(4, 0.0)]], 6)


def test_without_scipy_the_programme_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"needs scipy; install veneer\[compress\] or use 'heap'"):
        ilp([[Choice(1, 0.0)]], 1)

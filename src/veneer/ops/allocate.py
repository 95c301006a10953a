"""Ranks by budget: one choice from every layer's menu, of least total loss among those that cost at most a
budget.

A multiple-choice knapsack. `heap` follows the lower convex hull of every menu, always the step that saves
most loss for its cost, then fills what is left of the budget; `ilp` solves the integer programme (scipy's
HiGHS), of which heap's answer is a bound. Menus may fall steeply, jump (a layer that stays dense), or hold
choices that no one would take.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from veneer.errors import ConfigError


class Choice(NamedTuple):
    """One choice: its cost in parameters, and the loss that comes with it."""

    cost: int
    loss: float


Menu = Sequence[Choice]


def heap(menus: Sequence[Menu], budget: int) -> list[int]:
    """Returns the index of one choice of every menu, greedily. Raises ConfigError if the cheapest ones cost
    too much.
    """
    chosen = _cheapest(menus, budget)
    left = budget - sum(menu[i].cost for menu, i in zip(menus, chosen, strict=True))
    hulls = [_hull(menu, i) for menu, i in zip(menus, chosen, strict=True)]
    steps = [(_rate(menus[m], hull[0], hull[1]), m, 1) for m, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, m, at = heapq.heappop(steps)
        cost = menus[m][hulls[m][at]].cost - menus[m][chosen[m]].cost
        if cost > left:
            continue  # a later step of this menu costs more still
        left -= cost
        chosen[m] = hulls[m][at]
        if at + 1 < len(hulls[m]):
            heapq.heappush(steps, (_rate(menus[m], hulls[m][at], hulls[m][at + 1]), m, at + 1))
    return _filled(menus, chosen, left)


def _cheapest(menus: Sequence[Menu], budget: int) -> list[int]:
    """The cheapest choice of every menu, of those the one with the least loss."""
    chosen = [min(range(len(menu)), key=lambda i: menu[i]) for menu in menus]
    least = sum(menu[i].cost for menu, i in zip(menus, chosen, strict=True))
    if least > budget:
        raise ConfigError(f"keep: the budget of {budget:,} parameters must be at least {least:,}; raise keep")
    return chosen


def _hull(menu: Menu, first: int) -> list[int]:
    """Indices on the lower convex hull, from the cheapest choice on, with ever less loss."""
    found = [first]
    for i in sorted(range(len(menu)), key=lambda i: menu[i]):
        if menu[i].loss >= menu[found[-1]].loss:
            continue
        while len(found) > 1 and _rate(menu, found[-1], i) <= _rate(menu, found[-2], found[-1]):
            found.pop()
        found.append(i)
    return found


def _rate(menu: Menu, a: int, b: int) -> float:
    """The change of loss for each parameter from choice a to the dearer b: the more negative, the better."""
    return (menu[b].loss - menu[a].loss) / max(menu[b].cost - menu[a].cost, 1)


def _filled(menus: Sequence[Menu], chosen: list[int], left: int) -> list[int]:
    """The choices with what is left of the budget spent: the best affordable improvement again and again."""
    while True:
        best: tuple[float, int, int] | None = None
        for m, menu in enumerate(menus):
            here = menu[chosen[m]]
            for i, c in enumerate(menu):
                if c.loss < here.loss and c.cost - here.cost <= left:
                    rate = _rate(menu, chosen[m], i)
                    if best is None or rate < best[0]:
                        best = (rate, m, i)
        if best is None:
            return chosen
        _, m, i = best
        left -= menus[m][i].cost - menus[m][chosen[m]].cost
        chosen[m] = i


def ilp(menus: Sequence[Menu], budget: int, seconds: float = 60.0) -> list[int]:
    """Returns the index of one choice of every menu, of least total loss up to a millionth of it.

    seconds: time limit, after which the best answer found counts. Never worse than `heap`. Raises ConfigError
    without
    scipy, and as `heap`.

    """
    greedy = heap(menus, budget)
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError:
        raise ConfigError("allocate: 'ilp' needs scipy; install veneer[compress] or use 'heap'") from None
    owner = [m for m, menu in enumerate(menus) for _ in menu]
    flat = [c for menu in menus for c in menu]
    scale = max(max(c.loss for c in flat), 1e-300)
    one = csr_array(([1.0] * len(flat), (owner, range(len(flat)))), shape=(len(menus), len(flat)))
    rules = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(csr_array([[float(c.cost) for c in flat]]), -float("inf"), budget),
    ]
    found = milp(
        [c.loss / scale for c in flat],
        integrality=[1] * len(flat),
        bounds=Bounds(0, 1),
        constraints=rules,
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        return greedy
    starts = [owner.index(m) for m in range(len(menus))]
    exact = [
        max(range(len(menu)), key=lambda i: found.x[start + i])
        for menu, start in zip(menus, starts, strict=True)
    ]
    return min((exact, greedy), key=lambda chosen: _loss_within(menus, chosen, budget))


def _loss_within(menus: Sequence[Menu], chosen: Sequence[int], budget: int) -> float:
    """The total loss, infinite for choices beyond the budget."""
    cost = sum(menu[i].cost for menu, i in zip(menus, chosen, strict=True))
    return (
        sum(menu[i].loss for menu, i in zip(menus, chosen, strict=True)) if cost <= budget else float("inf")
    )

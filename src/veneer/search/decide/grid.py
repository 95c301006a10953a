"""Grids of learning rates by factors of two, extended while the best rate lies on the edge."""

from __future__ import annotations

import math
from collections.abc import Mapping

FEWEST = 5  # rates that a method is tried at
EXTENSIONS = 6  # rates that may be added on the edges


def around(centre: float, n: int) -> list[float]:
    """Returns n rates, neighbours a factor of two apart, with `centre` in the middle, rising."""
    first = -((n - 1) // 2)
    return [rounded(centre * 2.0 ** (first + i)) for i in range(n)]


def rounded(rate: float) -> float:
    """Returns the rate with four digits, so that its name in a folder is the rate itself."""
    return float(f"{rate:.4g}")


def beyond(costs: Mapping[float, float]) -> float | None:
    """Returns the rate to try next, or None if the best one has neighbours on both sides.

    costs: by rate, infinite where the trial diverged.
    """
    finite = [rate for rate, cost in costs.items() if math.isfinite(cost)]
    if not finite:
        return rounded(min(costs) / 2)
    best = min(finite, key=lambda rate: costs[rate])
    for edge, factor in ((min(costs), 0.5), (max(costs), 2.0)):
        if best == edge:
            return rounded(best * factor)
    return None


def tolerant(costs: Mapping[float, float], within: float) -> list[float]:
    """Returns the rates whose cost is at most `within` above the least, rising: sensitivity to the rate."""
    least = min(costs.values())
    return sorted(rate for rate, cost in costs.items() if cost <= least + within)

"""The smallest rank on the plateau of a curve: more rank gains less than noise or than a tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean, variance
from typing import NamedTuple

TOLERANCE = 0.005  # of the score: gains below are not worth a doubling


class Short(NamedTuple):
    """The loss of a rank against the largest, in cost; low, high: paired 95 % interval, None without."""

    cost: float
    shortfall: float
    low: float | None = None
    high: float | None = None


class Answer(NamedTuple):
    """A rank, and the reason in one sentence."""

    rank: int
    reason: str


def of_pilot(curve: Mapping[int, Short], tolerance: float = TOLERANCE) -> Answer:
    """Returns the smallest rank to which a pilot can be cut without a loss beyond noise or tolerance.

    curve: by rank, the largest the pilot itself.
    """
    most = max(curve)
    allowed = tolerance * abs(curve[most].cost)
    for rank in sorted(curve):
        short = curve[rank]
        if rank == most:
            break
        if short.shortfall <= allowed:
            size = f"{short.shortfall:+.4g}, within {tolerance:.2g} of the score"
            return Answer(rank, f"cut to rank {rank}, the pilot of rank {most} loses {size}")
        if short.low is not None and short.low <= 0:
            spread = f"{short.shortfall:+.4g}, 95 % interval {short.low:+.4g} to {short.high:+.4g}"
            inside = f"loses no more than noise ({spread})"
            return Answer(rank, f"cut to rank {rank}, the pilot of rank {most} {inside}")
    return Answer(most, f"every cut of the pilot of rank {most} loses score: the need may be higher still")


def of_sweep(costs: Mapping[int, Sequence[float]], tolerance: float = TOLERANCE) -> Answer | None:
    """Returns the rank after which one doubling gained too little, or None if every doubling still gains.

    costs: by rank, one for each seed, less is better.
    """
    ranks = sorted(costs)
    noise = spread(costs.values())
    for rank, double in pairwise(ranks):
        gain = mean(costs[rank]) - mean(costs[double])
        allowed = tolerance * abs(mean(costs[rank]))
        if gain < max(noise, allowed):
            bound = (
                f"the noise over seeds, {noise:.3g}" if noise >= allowed else f"{tolerance:.2g} of the score"
            )
            return Answer(rank, f"rank {double} gains {gain:+.4g} over rank {rank}, less than {bound}")
    return None


def spread(groups: Iterable[Sequence[float]]) -> float:
    """Returns the standard deviation within groups, pooled; 0 without two values in any group."""
    several = [g for g in groups if len(g) > 1]
    freedom = sum(len(g) - 1 for g in several)
    return math.sqrt(sum(variance(g) * (len(g) - 1) for g in several) / freedom) if freedom else 0.0


def floor(labels: int, parameters_per_rank: int) -> int:
    """Returns the rank whose parameters can hold a text: a bit a token, two bits a parameter.

    Schulman & Thinking Machines 2025, LoRA Without Regret, measured these two on other models.
    """
    return max(1, math.ceil(labels / 2 / parameters_per_rank))

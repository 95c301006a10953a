"""Says what a comparison costs before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from veneer.search.compare.settings import Comparison
from veneer.search.decide.halving import work
from veneer.units import duration


class Cost(NamedTuple):
    """Work of a comparison. trainings: full trainings that its trials amount to; whole: without halving.

    seconds: None where a training's time is unknown.
    """

    contenders: int
    trials: int
    trainings: float
    whole: float
    steps: int
    seconds: float | None

    def sentence(self) -> str:
        """Returns the cost in words."""
        time = "" if self.seconds is None else f", about {duration(self.seconds)} one after the other"
        contenders = "1 contender" if self.contenders == 1 else f"{self.contenders} contenders"
        return (
            f"{contenders}, {self.trials} trials: {self.steps:,} steps, as many as"
            f" {self.trainings:.3g} full trainings{time}, or {self.whole:.3g} without halving; evaluations"
            " and rates added at an edge of a grid come on top"
        )


def cost(
    comparison: Comparison, contenders: int, steps: int, seconds: Mapping[str, float] | None = None
) -> Cost:
    """Returns the cost of a comparison. seconds: of one full training by contender."""
    again, shorter = comparison.seeds - 1, list(comparison.durations)
    each = work(comparison.rates) + again + sum(shorter)
    whole = comparison.rates + again + sum(shorter)
    trials = contenders * (comparison.rates + again + len(shorter))
    time = sum(seconds.values()) * each if seconds else None
    total = contenders * each
    return Cost(contenders, trials, total, contenders * whole, round(total * steps), time)

"""Steps and seconds until a training reaches a reference score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from veneer.search.decide.trial import Point
from veneer.tasks import Metric

SHARE = 0.9  # of the reference's gain over the base


class Reached(NamedTuple):
    """The steps and seconds at which the reference was reached."""

    steps: float
    seconds: float


def reference(before: float, after: float) -> float:
    """Returns the score at 90 % of the gain from `before` to `after`."""
    return before + SHARE * (after - before)


def reached(points: Sequence[Point], wanted: float, metric: Metric) -> Reached | None:
    """Returns when the curve first reaches a score, interpolated between evaluations; None if it never does.

    reached((Point(0, 2.0, 0.0), Point(10, 1.0, 5.0)), 1.5, metric)  # Reached(5.0, 2.5)
    """
    target, before = metric.cost(wanted), None
    for point in points:
        cost = metric.cost(point.valid)
        if cost <= target:
            if before is None or cost == metric.cost(before.valid):
                return Reached(point.step, point.seconds)
            share = (metric.cost(before.valid) - target) / (metric.cost(before.valid) - cost)
            return Reached(
                before.step + share * (point.step - before.step),
                before.seconds + share * (point.seconds - before.seconds),
            )
        before = point
    return None

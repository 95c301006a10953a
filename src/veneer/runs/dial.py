"""The strength dial: new and known text measured at several strengths of an adapter, and the one to
recommend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from veneer.adapt.switch import using
from veneer.tasks import Metric, Task
from veneer.tasks.base.task import Between, nothing

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
WORTH = 0.95  # share of the largest gain that the recommended strength keeps


class Point(NamedTuple):
    """The metric on new text and on known text, None without one, at one strength."""

    strength: float
    target: float
    known: float | None = None

    def as_dict(self, metric: Metric) -> dict[str, float | None]:
        """Returns the point for results.json, as {strength, target_bpb, known_bpb}."""
        named = {f"target_{metric.name}": self.target, f"known_{metric.name}": self.known}
        return {"strength": self.strength, **named}

    @classmethod
    def of_dict(cls, found: Mapping[str, Any], metric: Metric) -> Point:
        """Returns the point of `as_dict`."""
        return cls(found["strength"], found[f"target_{metric.name}"], found.get(f"known_{metric.name}"))


def dial(
    model: nn.Module,
    name: str,
    task: Task,
    texts: Mapping[str, Sequence[Any]],
    *,
    strengths: Sequence[float] = STRENGTHS,
    batch: int = 8,
    between: Between = nothing,
) -> list[Point]:
    """Returns a point for every strength of adapter `name`, alone.

    texts: examples of "target" and, if forgetting is measured, of "known".
    """
    points = []
    for strength in strengths:
        with using(model, *([{name: strength}] if strength else [])):
            target, known = (
                task.measure(model, texts[t], batch=batch, between=between)[0].value if texts.get(t) else None
                for t in ("target", "known")
            )
        assert target is not None
        points.append(Point(strength, target, known))
    return points


def finite(*series: Sequence[Point]) -> list[list[Point]]:
    """Returns the series without the strengths at which a figure of any of them is NaN or infinite."""
    every = [p for points in series for p in points]
    odd = {p.strength for p in every if not all(math.isfinite(v) for v in p if v is not None)}
    return [[p for p in points if p.strength not in odd] for points in series]


def recommend(points: Sequence[Point], metric: Metric) -> float:
    """Returns the strength that forgets least among those that keep 95 % of the largest gain.

    Without known text it is the strength with the largest gain; 1 if nothing is learned. points: measured on
    validation text, strength 0 (the base) among them.
    """
    costs = {p: metric.cost(p.target) for p in points}
    base = next(costs[p] for p in points if p.strength == 0)
    most = max(base - cost for cost in costs.values())
    if most <= 0:
        return 1.0
    if any(p.known is None for p in points):
        return min(points, key=lambda p: costs[p]).strength
    good = [p for p in points if base - costs[p] >= WORTH * most]
    return min(good, key=lambda p: metric.cost(p.known or 0.0)).strength

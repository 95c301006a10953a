"""The strength dial: new and known text measured at several strengths of one adapter, and the strength to recommend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from veneer.adapt.switch import using
from veneer.data.pack import Window
from veneer.tasks import Objective
from veneer.train.loop.evaluate import bits_per_byte

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
WORTH = 0.95  # share of the most that can be learned which the recommended strength keeps


class Point(NamedTuple):
    """Bits per byte on new text and on known text at one strength; less is better."""

    strength: float
    target_bpb: float
    known_bpb: float


def dial(
    model: nn.Module,
    name: str,
    texts: Mapping[str, Sequence[Window]],
    objective: Objective,
    *,
    strengths: Sequence[float] = STRENGTHS,
    batch: int = 8,
    between: Callable[[], None] = lambda: None,
) -> list[Point]:
    """A point for every strength of adapter `name`, alone. texts: windows of "target" and of "known"."""
    points = []
    for strength in strengths:
        with using(model, *([{name: strength}] if strength else [])):
            target, known = (
                bits_per_byte(model, texts[t], objective, batch=batch, between=between)
                for t in ("target", "known")
            )
        points.append(Point(strength, target, known))
    return points


def recommend(points: Sequence[Point]) -> float:
    """The strength with the least forgotten among those that keep 95 % of the most learned; 1 if nothing is learned.

    points: measured on validation text, strength 0 (the base) among them.
    """
    base = next(p for p in points if p.strength == 0)
    most = max(base.target_bpb - p.target_bpb for p in points)
    if most <= 0:
        return 1.0
    good = [p for p in points if base.target_bpb - p.target_bpb >= WORTH * most]
    return min(good, key=lambda p: p.known_bpb).strength

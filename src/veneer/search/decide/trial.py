"""Trials: one training of one contender at one rate, seed and length, and how far it has come."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from veneer.tasks import Metric

GOING, FINISHED, DIVERGED = "going", "finished", "diverged"


EVALUATIONS = 8  # of a training; rungs lie on them


def every(steps: int) -> int:
    """Returns the distance of evaluations."""
    return max(1, math.ceil(steps / EVALUATIONS))


def rung(share: float, steps: int) -> int:
    """Returns the step of the evaluation at a share of the steps, a multiple of an eighth."""
    return min(steps, round(share * EVALUATIONS) * every(steps)) if share < 1 else steps


class Trial(NamedTuple):
    """One training. lr: peak rate; length: share of the comparison's steps."""

    label: str
    lr: float
    seed: int = 0
    length: float = 1.0

    @property
    def key(self) -> str:
        """Returns the trial's name, which is its folder's too."""
        length = "" if self.length == 1 else f"-x{self.length:g}"
        return f"{re.sub('[^a-z0-9.-]', '+', self.label)}-{self.lr:.4g}-s{self.seed}{length}"


class Point(NamedTuple):
    """One evaluation: the metric on valid text, and the seconds of training until there."""

    step: int
    valid: float
    seconds: float


class Progress(NamedTuple):
    """The evaluations of a trial so far. share: of its steps done; state: going, finished or diverged.

    reason: why it diverged.
    """

    share: float
    state: str
    points: tuple[Point, ...] = ()
    reason: str = ""

    def at(self, share: float, steps: int) -> Point | None:
        """Returns the last evaluation up to a share of `steps`."""
        within = [p for p in self.points if p.step <= rung(share, steps)]
        return within[-1] if within else None

    def cost(self, share: float, steps: int, metric: Metric) -> float:
        """Returns the metric at a share so that less is better; infinite for a trial that diverged."""
        point = self.at(share, steps)
        if self.state == DIVERGED or point is None or not math.isfinite(point.valid):
            return math.inf
        return metric.cost(point.valid)

    def best(self, metric: Metric) -> float:
        """Returns the least cost of all evaluations after the start, infinite if it diverged."""
        later = [metric.cost(p.valid) for p in self.points if p.step > 0]
        return min(later, default=math.inf) if self.state != DIVERGED else math.inf


class Trainer(Protocol):
    """Trains trials in part or in full."""

    metric: Metric
    steps: int

    def advance(self, trials: Sequence[Trial], share: float) -> Mapping[Trial, Progress]:
        """Returns the progress of all trials once each has come to `share` of its steps, or diverged."""

    def drop(self, trial: Trial, share: float, reason: str) -> None:
        """Records that a trial ends at this share, since it cannot win any more."""

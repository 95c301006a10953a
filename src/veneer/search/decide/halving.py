"""Successive halving without surprises: all trials of a pool reach a rung, then the worse half ends.

Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943. Rungs are synchronous: decisions depend on
figures alone, never on which process was faster. A killed comparison and one of several processes end alike.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

RUNGS = (0.125, 0.25, 0.5)  # shares of the steps after which the worse half of a pool ends
FINALISTS = 2  # trials of a pool that are trained in full
DECAY, WORSE = 0.9, 1.5  # of the running mean of the loss, and of it over its minimum in a divergence


def survivors(costs: Mapping[T, float], least: int = FINALISTS) -> list[T]:
    """Returns the better half of a pool, rounded up, at least `least` of them; none that diverged.

    costs: less is better, infinite for a divergence. Equal costs keep the earlier ones.
    """
    order = sorted((t for t in costs if math.isfinite(costs[t])), key=lambda t: costs[t])
    kept = set(order[: max(least, math.ceil(len(costs) / 2))])
    return [t for t in costs if t in kept]


def work(pool: int, rungs: Sequence[float] = RUNGS, least: int = FINALISTS) -> float:
    """Returns the work of one pool in full trainings, if no trial diverges."""
    total, before, n = 0.0, 0.0, pool
    for share in rungs:
        total += n * (share - before)
        n, before = min(n, max(least, math.ceil(n / 2))), share
    return total + n * (1 - before)


def diverged(losses: Sequence[float | None], *, worse_than_base: bool) -> str:
    """Returns why a training diverged, or "".

    losses: of its steps, None where a step was skipped. worse_than_base: on valid text.
    """
    skipped = sum(loss is None for loss in losses)
    if losses and skipped > len(losses) / 2:
        return f"{skipped} of {len(losses)} steps were skipped: loss or gradient was not finite"
    if not worse_than_base:
        return ""
    mean, least = math.nan, math.inf
    for loss in losses:
        if loss is not None:
            mean = loss if math.isnan(mean) else DECAY * mean + (1 - DECAY) * loss
            least = min(least, mean)
    if mean > WORSE * least:
        return f"its loss rose to {mean:.3g} from {least:.3g}, and valid text is worse than the base's"
    return ""

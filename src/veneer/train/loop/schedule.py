"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math
from collections.abc import Callable

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
}


def share(step: int, steps: int, warmup: int, shape: str) -> float:
    """Share of the peak rate at `step` of `steps`, counted from 0: a straight rise over `warmup` steps, then `shape`.

    The peak is reached at step `warmup`, and no step has rate 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SHAPES[shape]((step - warmup) / (steps - warmup))

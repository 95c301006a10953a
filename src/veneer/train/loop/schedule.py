"""The schedule of a run: its learning rate, evaluations and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
}


def share(step: int, steps: int, warmup: int, shape: str) -> float:
    """Returns the share of the peak rate at `step` of `steps`, counted from 0.

    It rises straight over `warmup` steps, reaches the peak at step `warmup`, then follows `shape`; it never
    is 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SHAPES[shape]((step - warmup) / (steps - warmup))


class Pace(NamedTuple):
    """The steps at which things happen, counted from 0; lr is the peak."""

    steps: int
    lr: float
    schedule: str
    warmup: int
    eval_every: int
    save_every: int
    keep: int
    patience: int | None = None  # evaluations without improvement that end the training

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return self.lr * share(step, self.steps, self.warmup, self.schedule)

    def evaluates(self, step: int) -> bool:
        """Tells if texts are measured before this step."""
        return step % self.eval_every == 0 or step == self.steps

    def is_over(self, step: int, best: int | None) -> bool:
        """Tells if patience has ended before this step. best: the best step so far."""
        if self.patience is None or best is None:
            return False
        return sum(self.evaluates(later) for later in range(best + 1, step + 1)) >= self.patience

    def why_over(self, step: int) -> str:
        """Returns a sentence on the end of a training without improvement."""
        waited = f"valid text has not improved for {self.patience} evaluations"
        return f"{waited}: the training ends after step {step} of {self.steps}"

    def saves(self, step: int) -> bool:
        """Tells if a checkpoint is due before this step."""
        return step > 0 and (step % self.save_every == 0 or step == self.steps)

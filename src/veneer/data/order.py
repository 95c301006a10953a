"""What a training step sees: a pure function of (seed, epoch, index), whatever was run before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from veneer.data.pack import Window
from veneer.ops.draws import keyed


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> list[int]:
    """The order of n windows in an epoch."""
    found: list[int] = torch.randperm(n, generator=keyed(seed, f"order of epoch {epoch}")).tolist()
    return found


class Order:
    """`total` windows in steps of `accumulate` micro-batches of `batch`; only the last step may be smaller.

    Epochs follow each other without a gap, each in an order of its own.
    """

    def __init__(self, windows: Sequence[Window], batch: int, accumulate: int, *, total: int, seed: int) -> None:
        self.windows, self.batch, self.total, self.seed = windows, batch, total, seed
        self.per_step = batch * accumulate
        self.steps = math.ceil(total / self.per_step)

    def step(self, step: int) -> list[list[Window]]:
        """The micro-batches of a step, counted from 0."""
        first = step * self.per_step
        last = min(first + self.per_step, self.total)
        return [[self._window(i) for i in range(at, min(at + self.batch, last))] for at in range(first, last, self.batch)]

    def _window(self, i: int) -> Window:
        epoch, index = divmod(i, len(self.windows))
        return self.windows[permutation(self.seed, epoch, len(self.windows))[index]]

"""What a training step sees: a pure function of (seed, epoch, index), whatever was run before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from veneer.data.pack import Window, n_tokens
from veneer.ops.draws import keyed

STRETCH = (
    50  # batches that are sorted by length together: enough for little padding, few enough for a mixed order
)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> list[int]:
    """The order of n windows in an epoch."""
    found: list[int] = torch.randperm(n, generator=keyed(seed, f"order of epoch {epoch}")).tolist()
    return found


def by_length(order: Sequence[int], lengths: Sequence[int], batch: int, draw: torch.Generator) -> list[int]:
    """The order with windows of like length side by side: sorted within every 50 batches, which are then shuffled."""
    found: list[int] = []
    for at in range(0, len(order), STRETCH * batch):
        stretch = sorted(order[at : at + STRETCH * batch], key=lambda i: lengths[i])
        whole = (
            len(stretch) // batch
        )  # a shorter batch stays last, or all that follow would be of mixed lengths
        turns = [*torch.randperm(whole, generator=draw).tolist(), whole]
        found += [i for turn in turns for i in stretch[turn * batch : (turn + 1) * batch]]
    return found


class Steps(Protocol):
    """What a training asks for its windows."""

    batch: int

    def step(self, step: int) -> list[list[Window]]:
        """The micro-batches of a step, counted from 0."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs of it."""

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Goes on where `state` was taken, of the tensors of a checkpoint."""


class Order:
    """`total` windows in steps of `accumulate` micro-batches of `batch`; only the last step may be smaller.

    Epochs follow each other without a gap, each in an order of its own. grouped: windows of a batch are of like length,
    for windows that are not packed.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        batch: int,
        accumulate: int,
        *,
        total: int,
        seed: int,
        grouped: bool = False,
    ) -> None:
        self.windows, self.batch, self.total, self.seed = windows, batch, total, seed
        self.per_step = batch * accumulate
        self.steps = math.ceil(total / self.per_step)
        self.lengths = [n_tokens([w]) for w in windows] if grouped else None
        self._orders: dict[int, list[int]] = {}

    def step(self, step: int) -> list[list[Window]]:
        """The micro-batches of a step, counted from 0."""
        first = step * self.per_step
        last = min(first + self.per_step, self.total)
        return [
            [self._window(i) for i in range(at, min(at + self.batch, last))]
            for at in range(first, last, self.batch)
        ]

    def state(self) -> dict[str, Tensor]:
        """Nothing: a step depends on its number alone."""
        return {}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Nothing has to be put back."""

    def _window(self, i: int) -> Window:
        epoch, index = divmod(i, len(self.windows))
        return self.windows[self._order(epoch)[index]]

    def _order(self, epoch: int) -> list[int]:
        plain = permutation(self.seed, epoch, len(self.windows))
        if self.lengths is None:
            return plain
        if epoch not in self._orders:
            draw = keyed(self.seed, f"batches of epoch {epoch}")
            self._orders = {epoch: by_length(plain, self.lengths, self.batch, draw)}
        return self._orders[epoch]

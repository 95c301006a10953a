"""Chooses the windows of each training step: a pure function of (seed, epoch, index)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from veneer.data.pack import Window, n_tokens
from veneer.ops.draws import keyed

STRETCH = 50  # batches sorted by length together: enough for little padding, few enough for a mixed order


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> list[int]:
    """Returns the order of n windows in an epoch."""
    found: list[int] = torch.randperm(n, generator=keyed(seed, f"order of epoch {epoch}")).tolist()
    return found


def by_length(order: Sequence[int], lengths: Sequence[int], batch: int, draw: torch.Generator) -> list[int]:
    """Returns the order sorted by length within every 50 batches; the batches are then shuffled."""
    found: list[int] = []
    for at in range(0, len(order), STRETCH * batch):
        stretch = sorted(order[at : at + STRETCH * batch], key=lambda i: lengths[i])
        whole = len(stretch) // batch  # a partial batch stays last, or later batches would mix lengths
        turns = [*torch.randperm(whole, generator=draw).tolist(), whole]
        found += [i for turn in turns for i in stretch[turn * batch : (turn + 1) * batch]]
    return found


class Steps(Protocol):
    """Provides a training with windows, step by step."""

    batch: int

    def step(self, step: int) -> list[list[Window]]:
        """Returns the micro-batches of a step, counted from 0."""

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors that a checkpoint stores."""

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `state` from the tensors of a checkpoint."""


class Order:
    """Orders `total` windows in steps of `accumulate` micro-batches of `batch`; only the last may be smaller.

    Epochs follow each other without a gap, each in its own order.
    grouped: puts windows of similar length in one batch, for windows that are not packed.
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
        """Returns the micro-batches of a step, counted from 0."""
        first = step * self.per_step
        last = min(first + self.per_step, self.total)
        return [
            [self._window(i) for i in range(at, min(at + self.batch, last))]
            for at in range(first, last, self.batch)
        ]

    def state(self) -> dict[str, Tensor]:
        """Returns no tensors: a step depends on its number alone."""
        return {}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Does nothing: a step depends on its number alone."""

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

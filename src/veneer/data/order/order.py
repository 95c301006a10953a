"""Chooses the examples of each training step: a pure function of (seed, epoch, index)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.ops.draws import keyed

STRETCH = 50  # batches sorted by size together: enough for little padding, few enough for a mixed order


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> list[int]:
    """Returns the order of n examples in an epoch."""
    found: list[int] = torch.randperm(n, generator=keyed(seed, f"order of epoch {epoch}")).tolist()
    return found


def by_size(order: Sequence[int], sizes: Sequence[int], batch: int, draw: torch.Generator) -> list[int]:
    """Returns the order sorted by size within every 50 batches; the batches are then shuffled."""
    found: list[int] = []
    for at in range(0, len(order), STRETCH * batch):
        stretch = sorted(order[at : at + STRETCH * batch], key=lambda i: sizes[i])
        whole = len(stretch) // batch  # a partial batch stays last, or later batches would mix sizes
        turns = [*torch.randperm(whole, generator=draw).tolist(), whole]
        found += [i for turn in turns for i in stretch[turn * batch : (turn + 1) * batch]]
    return found


class Steps(Protocol):
    """Provides a training with examples, step by step."""

    batch: int

    def step(self, step: int) -> list[list[Any]]:
        """Returns the micro-batches of a step, counted from 0."""

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors that a checkpoint stores."""

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `state` from the tensors of a checkpoint."""


class Order:
    """Orders `total` examples in steps of `accumulate` micro-batches of `batch`; only the last may be
    smaller.

    Epochs follow each other without a gap, each in its own order.
    sizes: of the examples; similar ones share a batch. None: any examples do, such as packed windows.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        batch: int,
        accumulate: int,
        *,
        total: int,
        seed: int,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.examples, self.batch, self.total, self.seed = examples, batch, total, seed
        self.per_step = batch * accumulate
        self.steps = math.ceil(total / self.per_step)
        self.sizes = sizes
        self._orders: dict[int, list[int]] = {}

    def step(self, step: int) -> list[list[Any]]:
        """Returns the micro-batches of a step, counted from 0."""
        first = step * self.per_step
        last = min(first + self.per_step, self.total)
        return [
            [self._example(i) for i in range(at, min(at + self.batch, last))]
            for at in range(first, last, self.batch)
        ]

    def state(self) -> dict[str, Tensor]:
        """Returns no tensors: a step depends on its number alone."""
        return {}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Does nothing: a step depends on its number alone."""

    def _example(self, i: int) -> Any:
        epoch, index = divmod(i, len(self.examples))
        return self.examples[self._order(epoch)[index]]

    def _order(self, epoch: int) -> list[int]:
        plain = permutation(self.seed, epoch, len(self.examples))
        if self.sizes is None:
            return plain
        if epoch not in self._orders:
            draw = keyed(self.seed, f"batches of epoch {epoch}")
            self._orders = {epoch: by_size(plain, self.sizes, self.batch, draw)}
        return self._orders[epoch]

"""The processes that train together: the interface, and the world of one process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", int, float, Tensor)
DIGEST = 8  # int32 numbers of a SHA-256


class World(ABC):
    """Processes of one training: this one is `rank` of `size`. The first one writes files and speaks."""

    rank: int
    size: int

    @abstractmethod
    def sum(self, value: Number) -> Number:
        """Returns the sum of all processes' values, the same in each."""

    @abstractmethod
    def barrier(self) -> None:
        """Waits until all processes are here."""

    def exchange(self, name: str) -> AbstractContextManager[None]:
        """Returns a block whose exchanges, made by PyTorch itself, fail with the name of the exchange."""
        return nullcontext()

    @property
    def first(self) -> bool:
        """Tells if this is the process that writes files and speaks."""
        return self.rank == 0

    @torch.no_grad()
    def join(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, in one exchange for each dtype.

        The layouts of the tensors stay: later products depend on them.
        """
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            alike = [t for t in tensors if t.dtype == dtype]
            flat = self.sum(torch.cat([t.reshape(-1) for t in alike]))
            for t, own in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                t.copy_(own.view(t.shape))

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Replaces each tensor by the one of process `source`."""
        for t in tensors if self.size > 1 else ():
            t.copy_(self.sum(t.clone() if self.rank == source else torch.zeros_like(t)))

    def unlike(self, digest: str) -> list[int]:
        """Returns the processes whose hexadecimal digest differs from the first one's."""
        if self.size == 1:
            return []
        every = torch.zeros(self.size, DIGEST, dtype=torch.int64)
        every[self.rank] = torch.tensor([int(digest[i : i + 8], 16) for i in range(0, 8 * DIGEST, 8)])
        every = self.sum(every)
        return [rank for rank in range(self.size) if not torch.equal(every[rank], every[0])]

    def shares(
        self, micro: Sequence[Sequence[Any]], whole: bool = False, alike: bool = False
    ) -> list[list[Any]]:
        """Returns this process' share of a step's micro-batches: a part of each.

        whole: micro-batches that must not be divided, dealt out in turn. alike: keeps empty shares, so that
        all processes have equally many.
        """
        if whole:
            shares = [list(some) for some in micro[self.rank :: self.size]]
            shares += [[]] * (-(-len(micro) // self.size) - len(shares))
        else:
            shares = [list(some[self.rank :: self.size]) for some in micro]
        return [some for some in shares if some or alike]


@contextmanager
def in_turn(world: World) -> Iterator[None]:
    """The first process passes the block before the others enter it."""
    if not world.first:
        world.barrier()
    yield
    if world.first:
        world.barrier()


class Alone(World):
    """One process."""

    rank, size = 0, 1

    def sum(self, value: Number) -> Number:
        """Returns the value."""
        return value

    def barrier(self) -> None:
        """Waits for nobody."""


ALONE = Alone()

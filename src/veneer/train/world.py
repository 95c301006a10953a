"""The processes that train together. So far there is one; a second kind of World brings more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", int, float, Tensor)


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

    @property
    def first(self) -> bool:
        """Tells if this is the process that writes files and speaks."""
        return self.rank == 0


class Alone(World):
    """One process."""

    rank, size = 0, 1

    def sum(self, value: Number) -> Number:
        """Returns the value."""
        return value

    def barrier(self) -> None:
        """Waits for nobody."""


ALONE = Alone()

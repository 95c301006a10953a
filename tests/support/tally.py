"""Counts faults and how many of them ended as they must, for the figures of `make test-faults`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
FULL = os.environ.get("VENEER_FAULTS") == "all"  # every point, not the sample of the ordinary tests
TRIED: Counter[str] = Counter()
RIGHT: Counter[str] = Counter()


@contextmanager
def one(kind: str) -> Iterator[None]:
    """Counts a fault of this kind; it is right if the block ends without an error."""
    TRIED[kind] += 1
    yield
    RIGHT[kind] += 1


def few(every: Sequence[T], n: int = 1) -> list[T]:
    """Returns all cases in the full form, the first n else."""
    return list(every if FULL else every[:n])


def sample(points: Sequence[T], short: int, full: int = 1 << 20) -> list[T]:
    """Returns about so many points, evenly spaced: `full` in the full form, `short` else."""
    return list(points[:: max(1, len(points) // (full if FULL else short))])

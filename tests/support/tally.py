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


def sample(points: Sequence[T], n: int, offset: int = 0) -> list[T]:
    """Returns all points in the full form, about n evenly spaced ones else."""
    stride = 1 if FULL else max(1, len(points) // n)
    return list(points[offset % stride :: stride])

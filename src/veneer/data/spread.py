"""Chooses evenly spaced entries of a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(every: Sequence[T], at_most: int) -> list[T]:
    """Returns at most that many entries, evenly spaced; all of them for 0."""
    n = len(every)
    return list(every) if not 0 < at_most < n else [every[i * n // at_most] for i in range(at_most)]

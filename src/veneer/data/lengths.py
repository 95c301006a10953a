"""Chooses the longest window from the lengths of rows and the model's context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

STEP = 64  # tokens: lengths are multiples of it
LEAST = 256  # tokens: shorter rows share a window, and texts are cut into such windows
MOST = 4096  # tokens: longer windows need much memory; ask for them by a number


class Choice(NamedTuple):
    """A length in tokens, and the sentence that tells why."""

    length: int
    reason: str


def choose(lengths: Sequence[int], context: int | None) -> Choice:
    """Returns the length that holds all rows, or 99 % of them if the longest is over twice as long.

    lengths: in tokens, of rows that must stay whole; texts are cut into windows anyway. At least 256 tokens,
    at most the model's context and 4096.
    """
    limit = min(context or MOST, MOST)
    if not lengths:
        length = min(LEAST, limit)
        return Choice(length, f"length {length} (auto): texts are cut into windows of it")
    median, p90, p99, longest = (percentile(lengths, share) for share in (0.5, 0.9, 0.99, 1.0))
    wanted = longest if longest <= 2 * p99 else p99
    length = min(max(LEAST, STEP * math.ceil(wanted / STEP)), limit)
    spread = f"{median} tokens at the median, {p90} at 90 %, {p99} at 99 %, at most {longest}"
    reason = f"length {length} (auto): rows have {spread}"
    if length < wanted:
        reason += "; limited by the model's context" if limit == context else f"; auto takes at most {MOST}"
    return Choice(length, reason)


def percentile(values: Sequence[int], share: float) -> int:
    """Returns the smallest value that at least this share of the values does not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]

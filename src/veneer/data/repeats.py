"""A source with a weight: how often an epoch has each of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from veneer.data.row_files import Row
from veneer.data.split import key


def weigh(rows: Sequence[Row], weight: float, seed: int) -> list[Row]:
    """The rows with `times` set: each floor(weight) times, and round(share * n) of n rows once more for the share that is left.

    Which rows those are is decided by a hash of their content and the seed, not by their place; rows of 0 times are left out.
    """
    whole, share = int(weight), weight % 1
    order = sorted(range(len(rows)), key=lambda i: key(rows[i], f"weight {seed}"))
    once_more = set(order[: round(share * len(rows))])
    counted = [replace(row, times=whole + (i in once_more)) for i, row in enumerate(rows)]
    return [row for row in counted if row.times]

"""Repeats the rows of a weighted source within an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from veneer.data.row_files import Row
from veneer.data.split import key


def weigh(rows: Sequence[Row], weight: float, seed: int) -> list[Row]:
    """Returns the rows with `times` set: floor(weight), plus one for the fraction's share of the rows.

    A hash of content and seed chooses these rows, not their place. Rows with times = 0 are left out.
    """
    whole, share = int(weight), weight % 1
    order = sorted(range(len(rows)), key=lambda i: key(rows[i], f"weight {seed}"))
    once_more = set(order[: round(share * len(rows))])
    counted = [replace(row, times=whole + (i in once_more)) for i, row in enumerate(rows)]
    return [row for row in counted if row.times]

"""A tenth of the rows set aside for validation, when no text is given for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from veneer.data.row_files import Row
from veneer.errors import DataError

SHARE = 0.1
FEW = 10  # below this many different rows, texts are cut instead


def split_off(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """(for training, for validation): a tenth of the rows by a hash of their content, so that equal rows stay together.

    Of fewer than ten texts, each gives its last tenth, cut at a line's end. Raises DataError where there is too little.
    """
    keys = [key(row, seed) for row in rows]
    order = sorted(set(keys))
    if len(order) < FEW and all(r.kind == "text" for r in rows):
        halves = [_cut(r) for r in rows]
        return [h for h, _ in halves], [t for _, t in halves]
    if len(order) < 2:
        raise DataError(
            f"{rows[0].where}: a single example leaves none for validation; give valid= or more data"
        )
    chosen = set(order[: max(1, round(SHARE * len(order)))])
    return [r for r, k in zip(rows, keys, strict=True) if k not in chosen], [
        r for r, k in zip(rows, keys, strict=True) if k in chosen
    ]


def key(row: Row, seed: int | str) -> str:
    """A hash of the row's columns and the seed: equal rows have equal ones."""
    content = json.dumps(row.columns, sort_keys=True, default=str)
    return hashlib.sha256(f"{seed}\0{content}".encode()).hexdigest()


def _cut(row: Row) -> tuple[Row, Row]:
    text = row.columns["text"]
    at = text.find("\n", int(len(text) * (1 - SHARE))) + 1 or int(len(text) * (1 - SHARE))
    at = at if text[at:].strip() else int(len(text) * (1 - SHARE))
    head, tail = text[:at], text[at:]
    if not (head.strip() and tail.strip()):
        raise DataError(
            f"{row.where} is too short ({len(text)} characters) to take validation text from it; give valid= or more data"
        )
    first, last = ({**row.columns, "text": part} for part in (head, tail))
    return replace(row, columns=first), replace(row, columns=last, where=f"{row.where} (end)")

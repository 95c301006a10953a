"""Sets a tenth of the rows aside for validation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from veneer.data.row_files import Row
from veneer.errors import DataError, option

SHARE = 0.1
FEW = 10  # different rows; with fewer, texts are cut instead


def split_off(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Returns (training, validation) rows: a tenth goes to validation, chosen by a hash of its content.

    Equal rows stay together. Fewer than ten texts give their last tenth each, cut at a line's end.
    Raises DataError if a part would be empty.
    """
    keys = [key(row, seed) for row in rows]
    order = sorted(set(keys))
    if len(order) < FEW and all(r.kind == "text" for r in rows):
        halves = [_cut(r) for r in rows]
        return [h for h, _ in halves], [t for _, t in halves]
    if len(order) < 2:
        raise DataError(
            f"{rows[0].where}: a single example cannot be split; give {option('valid')} or more data"
        )
    chosen = set(order[: max(1, round(SHARE * len(order)))])
    return [r for r, k in zip(rows, keys, strict=True) if k not in chosen], [
        r for r, k in zip(rows, keys, strict=True) if k in chosen
    ]


def key(row: Row, seed: int | str) -> str:
    """Returns a hash of the row's columns and the seed."""
    content = json.dumps(row.columns, sort_keys=True, default=str)
    return hashlib.sha256(f"{seed}\0{content}".encode()).hexdigest()


def _cut(row: Row) -> tuple[Row, Row]:
    text = row.columns["text"]
    at = text.find("\n", int(len(text) * (1 - SHARE))) + 1 or int(len(text) * (1 - SHARE))
    at = at if text[at:].strip() else int(len(text) * (1 - SHARE))
    head, tail = text[:at], text[at:]
    if not (head.strip() and tail.strip()):
        raise DataError(
            f"{row.where}: {len(text)} characters are too few to split off validation text;"
            f" give {option('valid')} or more data"
        )
    first, last = ({**row.columns, "text": part} for part in (head, tail))
    return replace(row, columns=first), replace(row, columns=last, where=f"{row.where} (end)")

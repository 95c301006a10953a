"""Names of classes: found in the rows to learn, checked in every row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from veneer.data.row_files import Row
from veneer.errors import DataError, first_few, option

WHOLE = re.compile(r"-?\d+")


def name_of(value: Any, where: str) -> str:
    """Returns the name of a class: a text, or a whole number. Raises DataError, naming the row."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: label must be a text or a whole number, got {value!r}")
    return str(value)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names sorted, as numbers if all of them are."""
    every = set(names)
    if all(WHOLE.fullmatch(n) for n in every):
        return tuple(sorted(every, key=int))
    return tuple(sorted(every))


def decided(rows: Sequence[Row], column: str = "label") -> tuple[str, ...]:
    """Returns the classes of the rows to learn. Raises DataError for fewer than two, or negative numbers."""
    where = {name_of(row.columns[column], row.where): row.where for row in reversed(rows)}
    names = ordered(where)
    negative = [n for n in names if WHOLE.fullmatch(n) and int(n) < 0]
    if negative:
        raise DataError(
            f"{where[negative[0]]}: label must be 0 or more, got {negative[0]} (the mark of a missing label);"
            " remove such rows"
        )
    if len(names) < 2:
        raise DataError(f"labels must have two classes or more, got {first_few(names)} in all rows to learn")
    return names


def index(value: Any, labels: Sequence[str], row: Row, task: str) -> int:
    """Returns the place of a class. Raises DataError, naming the row, for one that no row to learn has."""
    name = name_of(value, row.where)
    if name not in labels:
        raise DataError(
            f"{row.where}: label {name!r} is not among the classes to learn ({first_few(labels, 8)});"
            f" correct it, or name all classes by {option(f'{task}-labels')}"
        )
    return list(labels).index(name)


def confusion(truths: Iterable[int], answers: Iterable[int], labels: Sequence[str]) -> dict[str, Any]:
    """Returns {"names", "counts"}; counts[i][j]: examples of class i answered as class j."""
    counts = [[0] * len(labels) for _ in labels]
    for truth, answer in zip(truths, answers, strict=True):
        counts[truth][answer] += 1
    return {"names": list(labels), "counts": counts}

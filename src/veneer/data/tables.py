"""Reads tables: csv, tsv, a JSON list, parquet, arrow and feather, as pairs (place, column reader)."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from veneer import foreign
from veneer.errors import DataError, first_few

# Where a row stands, and a function that reads its columns.
Entry = tuple[str, Callable[[], dict[str, Any]]]
WRITTEN = (".csv", ".tsv", ".json")  # tables written as text
ARROW = (".parquet", ".arrow", ".feather")


def written(path: Path, text: str) -> Iterator[Entry]:
    """Yields the rows of a .csv, .tsv or .json file. Raises DataError if it is empty or not a table."""
    return (
        _listed(path, text)
        if path.suffix.lower() == ".json"
        else separated(path, io.StringIO(text, newline=""))
    )


def is_lines(path: Path, text: str) -> bool:
    """Tells if a .json file holds one object a line, as many public sets do."""
    first, _, rest = text.lstrip().partition("\n")
    if path.suffix.lower() != ".json" or not first.startswith("{") or not rest.strip():
        return False
    try:
        foreign.loads(first)
    except json.JSONDecodeError:
        return False
    return True


def listed(path: Path, text: str) -> Iterator[Entry] | None:
    """Returns the rows of a JSON list in a file of another name; None if the file is not one list."""
    try:
        foreign.loads(text)
    except json.JSONDecodeError:
        return None
    return _listed(path, text)


def _listed(path: Path, text: str) -> Iterator[Entry]:
    try:
        found = without_surrogates(foreign.loads(text))
    except json.JSONDecodeError as e:
        raise DataError(f"{path} line {e.lineno}: not JSON at column {e.colno} ({e.msg})") from None
    if not isinstance(found, list) or not found:
        inside = f"with {first_few(map(repr, found))}" if isinstance(found, dict) else "without rows"
        raise DataError(
            f"{path}: must be a JSON list of objects, one a row, got a {type(found).__name__} {inside}"
        )
    return ((f"{path} row {n}", partial(_object, row)) for n, row in enumerate(found, 1))


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"must be a JSON object with columns, got a {type(row).__name__}")
    return row


def separated(path: Path, lines: Iterable[str]) -> Iterator[Entry]:
    """Yields the rows of a .csv or .tsv, reading `lines` as needed. Raises DataError if it is not a table."""
    before = csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's 131072 characters
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    empty = True
    try:
        names = next(reader)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(
                f"{path}: column names must differ, got {first_few(map(repr, twice))} more than once;"
                f" rename them in the first line"
            )
        for n, row in enumerate(reader, 1):
            if row:
                empty = False
                yield f"{path} row {n}", partial(_fields, names, row)
    except csv.Error as e:
        raise DataError(f"{path}: {e}; double the quotes inside a quoted field") from None
    finally:
        csv.field_size_limit(before)
    if empty:
        raise DataError(f"{path}: the table has column names but no rows")


def _fields(names: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(names):
        raise DataError(
            f"the row must have {len(names)} fields, got {len(row)};"
            f" put fields with a separator or a line break in quotes"
        )
    return dict(zip(names, row, strict=True))


def arrow(path: Path) -> Iterator[Entry]:
    """Yields the rows of a parquet, arrow or feather file, read in batches.

    Raises DataError if the file is empty or not of its format.
    """
    import pyarrow

    n = 0
    try:
        for batch in _batches(path):
            for row in batch.to_pylist():
                n += 1
                yield f"{path} row {n}", partial(without_nulls, row)
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise DataError(
            f"{path}: unreadable as {path.suffix[1:].lower()} ({str(e).splitlines()[0]})"
        ) from None
    if not n:
        raise DataError(f"{path}: the table has no rows")


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import feather, ipc, parquet

    if path.suffix.lower() == ".parquet":
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(1000)
        return
    with pyarrow.memory_map(str(path)) as file:
        mark = file.read(6)
        file.seek(0)
        if mark[:4] == b"FEA1":  # feather version 1 has no batches
            yield from feather.read_table(path).to_batches(1000)
            return
        reader = ipc.open_file(file) if mark == b"ARROW1" else ipc.open_stream(file)
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if mark == b"ARROW1" else reader
        )
        yield from (part for batch in batches for part in _sliced(batch))


def _sliced(batch: Any) -> Iterator[Any]:
    return (batch.slice(at, 1000) for at in range(0, batch.num_rows, 1000))


def without_surrogates(value: Any) -> Any:
    """Returns a JSON value with U+FFFD in place of half surrogate pairs."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value
    if isinstance(value, dict):
        return {without_surrogates(k): without_surrogates(v) for k, v in value.items()}
    return [without_surrogates(v) for v in value] if isinstance(value, list) else value


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row without nulls inside its lists and objects.

    Arrow gives every object of a column the same keys and fills those it lacks with null.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value

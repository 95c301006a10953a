"""Tables into rows: csv, tsv, a JSON list, parquet, arrow and feather; each row's place beside what reads its columns."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from veneer.errors import DataError, first_few

Entry = tuple[str, Callable[[], dict[str, Any]]]
WRITTEN = (".csv", ".tsv", ".json")  # as text
ARROW = (".parquet", ".arrow", ".feather")


def written(path: Path, text: str) -> Iterator[Entry]:
    """The rows of a table that is text. Raises DataError for one without rows, or that is none."""
    return (
        _listed(path, text)
        if path.suffix.lower() == ".json"
        else separated(path, io.StringIO(text, newline=""))
    )


def _listed(path: Path, text: str) -> Iterator[Entry]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        lines = "; a file with one object a line is a .jsonl" if e.msg == "Extra data" else ""
        raise DataError(f"{path} line {e.lineno}: not JSON at column {e.colno} ({e.msg}){lines}") from None
    if not isinstance(found, list) or not found:
        what = f"with {first_few(map(repr, found))}" if isinstance(found, dict) else "without rows"
        raise DataError(
            f"{path} holds a JSON {type(found).__name__} {what}; write a list of objects, one a row"
        )
    return ((f"{path} row {n}", partial(_object, row)) for n, row in enumerate(found, 1))


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"a JSON {type(row).__name__}, not an object with columns")
    return row


def separated(path: Path, lines: Iterable[str]) -> Iterator[Entry]:
    """The rows of a .csv or .tsv from its lines, which are read as the rows are. Raises DataError for one that is none."""
    before = csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's 131072 characters
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    empty = True
    try:
        names = next(reader)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(
                f"{path}: several columns are called {first_few(map(repr, twice))}; the first line must name them apart"
            )
        for n, row in enumerate(reader, 1):
            if row:
                empty = False
                yield f"{path} row {n}", partial(_fields, names, row)
    except csv.Error as e:
        raise DataError(f"{path}: {e}; quotes within a quoted field are doubled") from None
    finally:
        csv.field_size_limit(before)
    if empty:
        raise DataError(f"{path} has a line of column names and no rows")


def _fields(names: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(names):
        raise DataError(
            f"{len(row)} fields, but {len(names)} columns; a field with a separator or a line break in it needs quotes"
        )
    return dict(zip(names, row, strict=True))


def arrow(path: Path) -> Iterator[Entry]:
    """The rows of a parquet, arrow or feather file, read in pieces. Raises DataError for a file without rows, or that is none."""
    import pyarrow

    n = 0
    try:
        for batch in _batches(path):
            for row in batch.to_pylist():
                n += 1
                yield f"{path} row {n}", partial(bare, row)
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise DataError(
            f"{path} is no {path.suffix[1:].lower()} file that can be read ({str(e).splitlines()[0]})"
        ) from None
    if not n:
        raise DataError(f"{path} has no rows")


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
        if mark[:4] == b"FEA1":  # feather's first version, which cannot be read in pieces
            yield from feather.read_table(path).to_batches(1000)
            return
        reader = ipc.open_file(file) if mark == b"ARROW1" else ipc.open_stream(file)
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if mark == b"ARROW1" else reader
        )
        yield from (part for batch in batches for part in _cut(batch))


def _cut(batch: Any) -> Iterator[Any]:
    return (batch.slice(at, 1000) for at in range(0, batch.num_rows, 1000))


def bare(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what is null inside its lists and objects: a column of a table gives all its objects the same names."""
    return {name: _bare(value) for name, value in row.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items() if v is not None}
    return [_bare(v) for v in value] if isinstance(value, list) else value

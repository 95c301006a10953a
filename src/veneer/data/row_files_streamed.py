"""Reads files one row at a time; a bad row raises when its turn comes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from veneer.data import tables
from veneer.data.forms.columns import example, form_of
from veneer.data.forms.shape import AS_IS, Shape
from veneer.data.row_files import Row, check_file, json_object, read_file
from veneer.data.tables import Entry
from veneer.errors import DataError


def stream_file(path: Path, shape: Shape = AS_IS) -> Iterator[Row]:
    """Yields the rows of a file in the order of `read_file`; a plain text is one row.

    Raises DataError at once if the file is missing or cannot be streamed, later for the first bad row.
    """
    check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise DataError(f"{path}: a JSON list cannot be streamed; write it as .jsonl, with one object a line")
    if suffix in tables.ARROW:
        return stream_rows(tables.arrow(path), shape, str(path))
    if suffix in tables.WRITTEN:
        return stream_rows(tables.separated(path, _lines(path, "")), shape, str(path))
    return (
        stream_rows(_objects(path), shape, str(path))
        if suffix == ".jsonl"
        else (row for _ in (0,) for row in read_file(path, shape))
    )


def stream_rows(entries: Iterator[Entry], shape: Shape = AS_IS, source: str = "") -> Iterator[Row]:
    """Yields the rows of one source. The first row's columns decide the form of all."""
    form = None
    for where, read_columns in entries:
        try:
            columns = shape.applied(read_columns())
            form = form or form_of(columns, shape)
            row = Row(*example(form, columns, shape), where, source=source)
        except DataError as e:
            raise DataError(f"{where}: {e.text}") from None
        yield row


def _objects(path: Path) -> Iterator[Entry]:
    for n, line in enumerate(_lines(path, "\n"), 1):  # JSON strings may hold other line breaks
        if n == 1 and line.lstrip().startswith("["):
            raise DataError(f"{path}: a JSON list cannot be streamed; write one object a line")
        if line.strip():
            yield f"{path} line {n}", partial(json_object, line)


def _lines(path: Path, newline: str) -> Iterator[str]:
    n = 0
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as lines:
            for n, line in enumerate(lines, 1):  # noqa: B007  (the except clause needs n)
                yield line
    except UnicodeDecodeError as e:
        where = f"byte 0x{e.object[e.start]:02x} after line {n}"
        raise DataError(f"{path}: not UTF-8 ({where}); convert it, for instance with iconv") from None
    if not n:
        raise DataError(f"{path}: the file is empty")

"""Reads files as rows: a plain text is one row, a .jsonl one row a line, a table its rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from veneer import foreign
from veneer.data import tables
from veneer.data.forms.columns import EMPTY, FORMS, example, form_of, used
from veneer.data.forms.shape import AS_IS, Shape
from veneer.errors import DataError, first_few, suggest

REFUSED = (
    ".xlsx",
    ".xls",
    ".ods",
    ".zip",
    ".gz",
    ".zst",
    ".pdf",
    ".docx",
)  # known formats that would otherwise fail as text in a wrong encoding
SHOWN = 5  # problems of one file that are listed before "and 12 more"


@dataclass(frozen=True)
class Row:
    """One row: its kind (messages, pair, text, or empty), a name for people, and its repeats in an epoch.

    source: the file that the row is from, beside which the files that it names are looked for.
    """

    kind: str
    columns: dict[str, Any]
    where: str
    times: int = 1
    source: str = field(default="", compare=False)


def read_files(paths: Iterable[Path], shape: Shape = AS_IS) -> list[Row]:
    """Returns the rows of all files, in order. Raises one DataError for all unusable files."""
    rows: list[Row] = []
    problems: list[str] = []
    for path in paths:
        try:
            rows += read_file(path, shape)
        except DataError as e:
            problems.append(e.text)
    if problems:
        raise DataError("\n".join(problems))
    return rows


def read_file(path: Path, shape: Shape = AS_IS) -> list[Row]:
    """Returns the rows of one file: .jsonl and tables by their columns, anything else as one text.

    Raises DataError if the file is missing, empty, not UTF-8, of an unsupported format, or has bad rows.
    """
    check_file(path)
    suffix = path.suffix.lower()
    if suffix in tables.ARROW:
        return checked(str(path), tables.arrow(path), shape)
    text = decode(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if suffix in tables.WRITTEN and not tables.is_lines(path, text):
        return checked(str(path), tables.written(path, text), shape)
    if suffix not in (".jsonl", ".json"):
        if not shape.reads_text:
            raise DataError(f"{path}: columns must be {shape.wanted}, got plain text; write a .jsonl or .csv")
        return [Row("text", {"text": text}, str(path))]
    listed = tables.listed(path, text) if text.lstrip().startswith("[") else None
    return checked(str(path), listed or _lines(path, text), shape)


def check_file(path: Path) -> None:
    """Raises DataError if the file is missing, a folder, or of an unsupported format."""
    if path.is_dir():
        inside = first_few(sorted(p.name for p in path.iterdir() if p.is_file()), 3)
        raise DataError(
            f"{path}: must be a file, got a folder; name the files in it ({inside or 'it is empty'})"
        )
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: the file does not exist{suggest(path.name, beside, listed=False)}")
    if path.suffix.lower() in REFUSED:
        raise DataError(
            f"{path}: unsupported format {path.suffix};"
            f" convert it to .csv, .parquet, or .jsonl with one JSON object a line"
        )


def decode(path: Path) -> str:
    """Returns a file's text without the byte order mark. Raises DataError naming the first non-UTF-8 byte."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        at = e.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line = raw[:at].count(b"\n") + 1
        where = f"byte 0x{raw[at]:02x} at offset {at}, line {line}"
        raise DataError(f"{path}: not UTF-8 ({where}); convert it, for instance with iconv") from None


def _lines(path: Path, text: str) -> Iterable[tables.Entry]:
    numbered = enumerate(text.split("\n"), 1)  # not splitlines(): JSON strings may hold other line breaks
    return ((f"{path} line {n}", partial(json_object, line)) for n, line in numbered if line.strip())


def checked(name: str, found: Iterable[tables.Entry], shape: Shape = AS_IS) -> list[Row]:
    """Returns the rows of one source from (where, reader of its columns).

    The first row's columns decide the form of all. Raises one DataError for all bad rows, naming a few.
    """
    rows, problems, form = [], [], None
    for where, read_columns in found:
        try:
            columns = shape.applied(read_columns())
            form = form or form_of(columns, shape)
            rows.append(Row(*example(form, columns, shape), where, source=name))
        except DataError as e:
            problems.append(f"{where}: {e.text}")
            if form is None:  # an unknown form of the first row would make every other row wrong too
                break
    if problems:
        more = [f"and {len(problems) - SHOWN} more in {name}"] if len(problems) > SHOWN else []
        raise DataError("\n".join(problems[:SHOWN] + more))
    return rows


def json_object(line: str) -> dict[str, Any]:
    """Returns the JSON object in a line. Raises DataError for anything else."""
    try:
        found = foreign.loads(line)
    except json.JSONDecodeError as e:
        raise DataError(f"not JSON at column {e.colno} ({e.msg})") from None
    found = tables.without_surrogates(found) if "\\u" in line else found
    if not isinstance(found, dict):
        raise DataError(f"must be a JSON object with columns, got a {type(found).__name__}")
    return found


def unused(rows: Iterable[Row]) -> list[str]:
    """Returns the names of columns that no kind of text uses; rows of a task's own kinds are not looked
    at."""
    texts = (row for row in rows if row.kind in (*FORMS, EMPTY))
    return sorted({name for row in texts for name in row.columns if name not in used(row.kind)})

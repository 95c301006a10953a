"""Files into rows: plain text is one row a file, jsonl one row a line; anything that is not as it should be is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import DataError, first_few, suggest

KINDS = {"messages": ("messages",), "pair": ("prompt", "completion"), "text": ("text",)}
TABLES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
SHOWN = 5  # problems of one file that are listed before "and 12 more"


@dataclass(frozen=True)
class Row:
    """One example as its file has it; `kind` is a key of KINDS, `where` names it for people."""

    kind: str
    columns: dict[str, Any]
    where: str


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files, in their order. Raises one DataError for all files that cannot be used."""
    rows: list[Row] = []
    problems: list[str] = []
    for path in paths:
        try:
            rows += read_file(path)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(problems))
    return rows


def read_file(path: Path) -> list[Row]:
    """The rows of one file: .jsonl by its columns, anything else as one text.

    Raises DataError for a file that is missing, empty, not UTF-8, a table of another format, or has rows that do not fit.
    """
    if path.is_dir():
        inside = first_few(sorted(p.name for p in path.iterdir() if p.is_file()), 3)
        raise DataError(f"{path} is a folder; name the files in it that are to be read ({inside or 'it has none'})")
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist{suggest(path.name, beside, listed=False)}")
    if path.suffix.lower() in TABLES:
        raise DataError(f"{path}: {path.suffix} is not read; write it as .jsonl, one JSON object a line")
    text = decode(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    return list(_lines(path, text)) if path.suffix.lower() == ".jsonl" else [Row("text", {"text": text}, str(path))]


def decode(path: Path) -> str:
    """A file's text, without the byte order mark. Raises DataError with the offset of the first byte that is not UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        at = e.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line = raw[:at].count(b"\n") + 1
        where = f"byte 0x{raw[at]:02x} at offset {at}, line {line}"
        raise DataError(f"{path} is not UTF-8 ({where}); convert it first, for instance with iconv") from None


def _lines(path: Path, text: str) -> Iterator[Row]:
    rows, problems, kind = [], [], None
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold other line breaks
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            columns = _object(line)
            kind = kind or _kind(columns)
            _check(kind, columns)
            rows.append(Row(kind, columns, where))
        except DataError as e:
            problems.append(f"{where}: {e}")
            if kind is None:  # the columns of the first row decide; without them every other row would be wrong too
                break
    if problems:
        more = [f"and {len(problems) - SHOWN} more in {path}"] if len(problems) > SHOWN else []
        raise DataError("\n".join(problems[:SHOWN] + more))
    return iter(rows)


def _object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as e:
        raise DataError(f"not JSON at column {e.colno} ({e.msg})") from None
    if not isinstance(found, dict):
        raise DataError(f"a JSON {type(found).__name__}, not an object with columns")
    return found


def _kind(columns: dict[str, Any]) -> str:
    found = [kind for kind, names in KINDS.items() if all(n in columns for n in names)]
    if len(found) > 1:
        raise DataError(f"has the columns of {len(found)} kinds of example ({', '.join(found)}); keep those of one")
    if found:
        return found[0]
    half = next((names for names in KINDS.values() if any(n in columns for n in names)), None)
    missing = next((n for n in half or () if n not in columns), None)
    if missing:
        raise DataError(_lacks(missing, columns))
    near = next((hint for n in columns if (hint := suggest(n, [c for names in KINDS.values() for c in names])).startswith("; did")), "")
    raise DataError(f"no column 'text', 'prompt' with 'completion', or 'messages'{near}; it has {_named(columns)}")


def _named(columns: Iterable[str]) -> str:
    return first_few((repr(c) for c in columns), 8) or "no columns"


def _lacks(name: str, columns: dict[str, Any]) -> str:
    near = suggest(name, columns) if columns else ""
    return f"no column {name!r}{near if near.startswith('; did') else ''}; it has {_named(columns)}"


def _check(kind: str, columns: dict[str, Any]) -> None:
    for name in KINDS[kind]:
        if name not in columns:
            raise DataError(_lacks(name, columns))
        if kind != "messages" and not isinstance(columns[name], str):
            raise DataError(f"{name!r} is {json.dumps(columns[name])[:40]}, not text")
    if kind == "messages":
        _check_messages(columns["messages"])
    elif not columns[KINDS[kind][-1]]:
        raise DataError(f"{KINDS[kind][-1]!r} is empty: there would be nothing to learn")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' is not a list with at least one message")
    for i, message in enumerate(messages, 1):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise DataError(f"message {i} has no text {name!r}")
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise DataError("no message of role 'assistant' with content: there would be nothing to learn")


def unused(rows: Iterable[Row]) -> list[str]:
    """Columns that rows have and no kind of example uses."""
    return sorted({name for row in rows for name in row.columns if name not in KINDS[row.kind]})

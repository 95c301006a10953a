"""Reads training text row by row while it is learned from (`fit --stream`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from veneer.data.forms.columns import EMPTY
from veneer.data.order.streamed import Place, Stream
from veneer.data.reading import AUTO, NO_TEXT
from veneer.data.row_files import Row
from veneer.data.split import key
from veneer.errors import DataError, option
from veneer.runs.texts import sources, texts
from veneer.runs.texts.encoded import LEFT_OUT, encode_rows, pieces_of, verdict, words
from veneer.runs.texts.texts import Text
from veneer.tasks import Task
from veneer.tasks.base.encoded import Encoded
from veneer.train.loop.progress import Notes
from veneer.train.run import Run

LOOKED = 64  # windows at the beginning, on which the model is tried out and which the report shows
VALID = 24  # windows of the first rows that are set aside, where all of valid text is measured
ROWS = 256  # rows at the beginning whose lengths decide the window


def gather(run: Run, notes: Notes) -> dict[str, list[Row]]:
    """Returns measured rows by part; training text is not read yet.

    Raises one DataError for unreadable texts.
    """
    weighted = [name for name in run.data if sources.weight(name) != 1]
    if weighted:
        raise DataError(
            f"{' '.join(weighted)}: a stream takes its sources in turn, without weights; remove @ and the"
            f" number"
        )
    if not run.chooses:
        raise DataError(
            f"{option('valid', NO_TEXT)} needs all rows at the start, which a stream lacks; give valid text"
        )
    found = texts.read(run, ("valid", "test", "known"))
    texts.say_what_is_left_out(found, notes)
    return {part: rows for part, rows in found.items() if rows}


def looked_at(run: Run, task: Task) -> list[Encoded]:
    """Returns the first rows, whose lengths decide the window, where the run leaves it open."""
    return encode_rows(list(first_rows(run)), task) if run.length == AUTO else []


def first_rows(run: Run) -> Iterator[Row]:
    """Yields the first rows of the stream, which decide the settings that the run leaves open."""
    return islice(_all(run), ROWS)


def begin(found: dict[str, Text], run: Run, task: Task, notes: Notes) -> dict[str, Text]:
    """Returns the parts with the beginning of the stream as train, and its first rows as valid if none is
    given.

    Raises DataError for a beginning with unusable rows.
    """
    aside = _set_aside(run, task)
    if aside:
        found = {"valid": texts.prepare(aside, task, notes, "valid"), **found}
        notes.say(
            f"no valid text is given: the first {len(aside)} rows of the stream are set aside to choose"
            f" the best"
            f" step by, and rows equal to them are not learned; give valid if the data is sorted"
        )
    left_out = _keys(aside)
    head = _first((row for row in _all(run) if _is_learned(row, left_out)), LOOKED, run, task)
    if not head:
        raise DataError(
            f"{' '.join(run.data)}: the rows set aside as valid text leave nothing to learn; give"
            f" {option('valid')} or more data"
        )
    for sentence in task.opening({"train": head}):
        if sentence not in notes.said:
            notes.say(sentence)
    task.check_rows([row for row in head if row.kind != EMPTY])
    train = texts.prepare(head, task, notes, "train")
    sizes = {name: Path(name).stat().st_size for name in run.data if Path(name).is_file()}
    notes.say(
        f"data is read during training: the next window is drawn from {run.buffer}; rows are checked as"
        f" they come"
    )
    return {"train": Text(train.examples[:LOOKED], {**train.facts, "stream": sizes}, train.left_out), **found}


def order(run: Run, task: Task, notes: Notes) -> Stream:
    """Returns the windows that the steps of the run learn from."""
    left_out = _keys(_set_aside(run, task))
    return Stream(
        lambda place: _reading(run, task, left_out, place, notes),
        task,
        run.batch,
        run.accumulate,
        buffer=run.buffer,
        seed=run.seed,
    )


def _set_aside(run: Run, task: Task) -> list[Row]:
    """Returns the first rows, as many as valid text needs; none where valid text is given."""
    return [] if run.valid else _first(_all(run), run.eval_windows or VALID, run, task)


def _first(rows: Iterator[Row], n: int, run: Run, task: Task) -> list[Row]:
    """Returns the first rows, as many as fill n windows."""
    found, filled = [], 0.0
    for row in rows:
        found.append(row)
        filled += task.filled(_pieces(row, task, Notes()))
        if filled >= n:
            break
    return found


def _all(run: Run) -> Iterator[Row]:
    """Yields the rows of all sources, which take turns until each has ended."""
    shape = texts.shape_of(run)
    readings = [sources.stream(name, "train", shape) for name in run.data]
    while readings:
        for reading in list(readings):
            row = next(reading, None)
            if row is None:
                readings.remove(reading)
            else:
                yield row


def _keys(aside: list[Row]) -> set[str]:
    return {key(row, 0) for row in aside}


def _is_learned(row: Row, left_out: set[str]) -> bool:
    return not left_out or key(row, 0) not in left_out


def _reading(
    run: Run, task: Task, left_out: set[str], place: Place, notes: Notes
) -> Iterator[tuple[Place, Any]]:
    """Yields the pieces of the stream from a place on; it begins again where it ends.

    Raises DataError where the rows up to the place, or those of an earlier pass, are no longer the same.
    """
    whole = b""  # a hash of all rows of the pass before
    while True:
        n, learned, seen = -1, 0, b""
        for n, row in enumerate(_all(run)):
            seen = hashlib.sha256(seen + key(row, "stream").encode()).digest()
            if n < place.row:
                continue
            if n == place.row:
                _check_seen(run, place.seen in (b"", seen), f"the first {n + 1} rows of the stream")
            if _is_learned(row, left_out):
                made = _pieces(row, task, notes)
                learned += bool(made)
                made = made[place.pieces if n == place.row else 0 :]
                done = place.pieces if n == place.row else 0
                yield from ((Place(n, i, seen), piece) for i, piece in enumerate(made, done + 1))
        _check_seen(run, n >= place.row, f"the first {place.row + 1} rows of the stream")
        _check_seen(run, whole in (b"", seen), "the rows of the stream")
        if not learned and not place.row:
            raise DataError(
                f"{' '.join(run.data)}: nothing is left to learn; the data has changed since the run began"
            )
        again = f"all {n + 1} rows of the stream have been read; it begins again"
        if again not in notes.said:
            notes.say(again)
        place, whole = Place(), seen


def _check_seen(run: Run, same: bool, rows: str) -> None:
    """Raises DataError if rows have changed, unless the run allows other data."""
    if not same and "data" not in run.allow:
        raise DataError(
            f"{' '.join(run.data)}: {rows} have changed since they were learned; restore them, or go on with"
            f" {option('allow', 'data')}"
        )


def _pieces(row: Row, task: Task, notes: Notes) -> list[Any]:
    """Returns the pieces of one row, none of a row to leave out.

    Raises DataError if the settings forbid that.
    """
    (one,) = encode_rows([row], task)
    why, window = verdict(one, task), task.reading.window
    if why not in LEFT_OUT:
        return pieces_of(one, task, window)
    if getattr(task.reading, why) == "error":
        refused = words(why, window).partition(" and ")[0]
        raise DataError(f"{row.where}: {option(why, 'error')} refuses rows that {refused}")
    sentence = f"rows of the stream {words(why, window)}"
    if not any(said.startswith(sentence) for said in notes.said):
        notes.say(f"{sentence}; the first is {row.where}")
    return []

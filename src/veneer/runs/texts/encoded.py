"""Reads rows by a task, and leaves out rows that are too long or have nothing to learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from veneer.data.forms.columns import EMPTY
from veneer.data.reading import Reading
from veneer.data.row_files import SHOWN, Row
from veneer.errors import DataError, first_few, option
from veneer.tasks import Task
from veneer.tasks.base.encoded import Encoded
from veneer.train.loop.progress import Notes

LEFT_OUT = ("overlong", "empty")
SHARE = 0.1  # of the rows of a part: leaving out more is an error


class LeftOut(NamedTuple):
    """Names of rows: too long and left out, without anything to learn and left out, and cut."""

    overlong: list[str]
    empty: list[str]
    cut: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """Returns the numbers of rows left out, without zeros."""
        return {name: len(getattr(self, name)) for name in LEFT_OUT if getattr(self, name)}


def encode_rows(rows: Sequence[Row], task: Task) -> list[Encoded]:
    """Returns the rows as the task reads them; an empty row has no content.

    Raises one DataError for all rows that the task cannot read, naming a few.
    """
    found, problems = [], []
    for row in rows:
        try:
            found.append(Encoded(row, None) if row.kind == EMPTY else task.encode(row))
        except DataError as e:
            problems.append(e.text)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError("\n".join([*problems[:SHOWN], *more]))
    return found


def pieces_of(one: Encoded, task: Task, window: int) -> list[Any]:
    """Returns the pieces of a row, cut to the window; none of an empty one."""
    return [] if one.row.kind == EMPTY else task.pieces(one, window)


def keep(encoded: Sequence[Encoded], task: Task, part: str, notes: Notes) -> tuple[list[Encoded], LeftOut]:
    """Returns the rows to use and those left out.

    Raises DataError if the settings forbid to leave rows out, or for too many of them.
    """
    reading = task.reading
    window, found = reading.window, LeftOut([], [], [])
    kept = []
    for one in encoded:
        why = verdict(one, task)
        if why:
            getattr(found, why).append(one.row.where)
        if why not in LEFT_OUT:
            kept.append(one)
    lengths = {one.row.where: one.whole or 0 for one in encoded}
    _check_overlong(found, lengths, reading, part)
    _check_empty(found.empty, len(encoded), task, part)
    for why, names in found._asdict().items():
        if names:
            rows = f"{len(names)} of {len(encoded)} rows"
            notes.say(f"{part}: {rows} {words(why, window)}: {first_few(names, 3)}")
    return kept, found


def verdict(one: Encoded, task: Task) -> str:
    """Returns the name of the field of LeftOut that the row belongs to, or an empty string."""
    window, whole = task.reading.window, one.whole
    long = whole is not None and whole > window
    if not pieces_of(one, task, whole or window if long else window):
        return "empty"
    if not long:
        return ""
    # A row whose whole answer would be cut away is left out.
    return "cut" if task.reading.overlong == "cut" and pieces_of(one, task, window) else "overlong"


def words(why: str, window: int) -> str:
    """Returns the rest of a sentence on rows of a field of LeftOut."""
    if why == "empty":
        return "have nothing to learn and are left out"
    return f"are longer than length={window} tokens and {'cut' if why == 'cut' else 'left out'}"


def _check_overlong(found: LeftOut, lengths: dict[str, int], reading: Reading, part: str) -> None:
    long, cuts = found.overlong, reading.overlong == "cut"
    if not long:
        return
    most, named = max(lengths[where] for where in long), first_few(f"{w} ({lengths[w]})" for w in long)
    are = "have their whole answer beyond" if cuts else "are longer than"
    length = option("length", reading.window)
    rows = f"{part}: {len(long)} of {len(lengths)} rows {are} {length} tokens: {named}"
    if reading.overlong == "error":
        raise DataError(
            f"{rows}; use {option('length', most)}, shorten them, or set {option('overlong')} to drop or cut"
        )
    if len(long) > SHARE * len(lengths):
        cut = "" if cuts else f", set {option('overlong', 'cut')}"
        raise DataError(
            f"{rows}; at most {SHARE:.0%} may be left out: use {option('length', most)}{cut}, or shorten them"
        )


def _check_empty(names: Sequence[str], total: int, task: Task, part: str) -> None:
    reading = task.reading
    if names and (reading.empty == "error" or len(names) > SHARE * total):
        limit = "" if reading.empty == "error" else f"at most {SHARE:.0%} may be left out: "
        drop = f", or set {option('empty', 'drop')}" if reading.empty == "error" else ""
        why, advice = "every label is masked", "give them a completion"
        if "train_on" in task.SETTINGS:
            advice += f"{',' if drop else ' or'} use {option('train_on', 'all')}"
        else:
            why, advice = task.UNLEARNED
        raise DataError(
            f"{part}: {len(names)} of {total} rows have nothing to learn ({why}): {first_few(names)};"
            f" {limit}{advice}{drop}"
        )

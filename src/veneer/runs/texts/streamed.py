"""`fit --stream`: training text that is read a row at a time while it is learned from, and never held as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from veneer.data.order_streamed import Place, Stream
from veneer.data.pack import Segment
from veneer.data.row_files import Row
from veneer.data.split import key
from veneer.errors import DataError
from veneer.runs.texts import sources, texts
from veneer.runs.texts.texts import Text
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

LOOKED = 64  # windows at the beginning, on which the model is tried out and which the report shows
VALID = 24  # windows of the first rows that are set aside, where all of valid text is measured


def gather(run: Run, voice: Voice) -> dict[str, list[Row]]:
    """Rows of what is measured, by part; the training text is not read yet. Raises one DataError for all that cannot be read."""
    weighted = [name for name in run.data if sources.weight(name) != 1]
    if weighted:
        raise DataError(
            f"{' '.join(weighted)}: the sources of a stream take turns and have no weight; leave @ and what follows out"
        )
    found = texts.read(run, ("valid", "test", "known"))
    texts.say_what_is_left_out(found, voice)
    return {part: rows for part, rows in found.items() if rows}


def begin(found: dict[str, Text], run: Run, tokenizer: Any, voice: Voice) -> dict[str, Text]:
    """The parts with the beginning of the stream as train, and with valid text from its first rows where none is given.

    Raises DataError for a beginning that does not fit.
    """
    aside = _set_aside(run, tokenizer)
    if aside:
        found = {"valid": texts.prepare(aside, run, tokenizer, voice), **found}
        voice.say(
            f"no valid text is given: the first {len(aside)} rows of the stream are set aside to choose the best step by, and rows equal to"
            f" them are not learned; give valid= if the data is sorted"
        )
    left_out = _keys(aside)
    head = _first((row for row in _all(run) if _is_learned(row, left_out)), LOOKED, run, tokenizer)
    if not head:
        raise DataError(
            f"{' '.join(run.data)}: the rows set aside as valid text leave nothing to learn; give valid= or more data"
        )
    texts.check_roles(head, run.train_roles)
    train = texts.prepare(head, run, tokenizer, voice)
    sizes = {name: Path(name).stat().st_size for name in run.data if Path(name).is_file()}
    voice.say(
        f"data is read as it is learned: {run.buffer} windows are held, from which the next is drawn; rows are checked as they come"
    )
    return {"train": Text(train.windows[:LOOKED], {**train.facts, "stream": sizes}), **found}


def order(run: Run, tokenizer: Any, voice: Voice) -> Stream:
    """What the steps of the run learn from."""
    left_out = _keys(_set_aside(run, tokenizer))
    return Stream(
        lambda place: _reading(run, tokenizer, left_out, place, voice),
        run.length if run.packing else None,
        run.batch,
        run.accumulate,
        buffer=run.buffer,
        seed=run.seed,
    )


def _set_aside(run: Run, tokenizer: Any) -> list[Row]:
    """The first rows, as many as valid text needs; none where it is given."""
    return [] if run.valid else _first(_all(run), run.eval_windows or VALID, run, tokenizer)


def _first(rows: Iterator[Row], n: int, run: Run, tokenizer: Any) -> list[Row]:
    """The first rows, as many as fill n windows."""
    found, filled = [], 0.0
    for row in rows:
        own = _segments(row, run, tokenizer)
        found.append(row)
        filled += sum(len(s.inputs) for s in own) / run.length if run.packing else len(own)
        if filled >= n:
            break
    return found


def _all(run: Run) -> Iterator[Row]:
    """The rows of all sources, which take turns until each has ended."""
    readings = [sources.stream(name, "train") for name in run.data]
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
    run: Run, tokenizer: Any, left_out: set[str], place: Place, voice: Voice
) -> Iterator[tuple[Place, Segment]]:
    """From a place on, what is learned of the stream, which begins again where it ends."""
    while True:
        rows = enumerate(_all(run))
        n = learned = 0
        for n, row in islice(rows, place.row, None):
            if _is_learned(row, left_out):
                learned += 1
                made = _segments(row, run, tokenizer)[place.segments if n == place.row else 0 :]
                yield from (
                    (Place(n, place.segments * (n == place.row) + i), s) for i, s in enumerate(made, 1)
                )
        if not learned and not place.row:
            raise DataError(
                f"{' '.join(run.data)}: there is nothing left to learn; the data has changed since the run began"
            )
        again = f"all {n + 1} rows of the stream have been read; it begins again"
        if again not in voice.said:
            voice.say(again)
        place = Place()


def _segments(row: Row, run: Run, tokenizer: Any) -> list[Segment]:
    """The segments of one row, each with numbers of its own: a part of a long text must not keep the whole alive."""
    (found,) = texts.by_row([row], run, tokenizer, Voice(False))
    return [Segment(*(t.clone() for t in s)) for s in found] if len(found) > 1 else found

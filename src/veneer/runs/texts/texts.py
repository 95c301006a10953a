"""Reads the texts that a run names into examples, by the part each plays: train, valid, test, known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from veneer import embedded
from veneer.data import leaks, row_files, split
from veneer.data.forms.columns import EMPTY
from veneer.data.forms.shape import Shape
from veneer.data.reading import NO_TEXT
from veneer.data.row_files import Row
from veneer.errors import DataError, first_few
from veneer.runs.texts import sources
from veneer.runs.texts.encoded import LeftOut, encode_rows, keep
from veneer.tasks import Task, get
from veneer.tasks.base.encoded import Encoded
from veneer.train.loop.progress import Notes
from veneer.train.run import Run

FLATTERS = "; their figures flatter"
ALL_LEARNED = f"valid is {NO_TEXT!r}"
SAMPLE = 0.1  # of the training rows: measured in place of valid text where all of it is learned


class Text(NamedTuple):
    """A text as examples. facts: for config.json, the same in a resumed run; left_out: names of rows.

    kept: the rows of a measured text as the task reads them.
    """

    examples: Sequence[Any]
    facts: dict[str, Any]
    left_out: LeftOut = LeftOut([], [], [])
    kept: Sequence[Encoded] = ()


def named(run: Run) -> Run:
    """Returns the run with default texts: other parts of built-in data, and the built-in model's known
    text."""
    builtin = all(sources.is_builtin(name) for name in run.data)
    # Names without a part of their own.
    own = tuple(sources.plain(name) for name in run.data if name.count(":") == 1) if builtin else ()
    known = run.known or (("builtin:known",) if run.model == embedded.PREFIX else (NO_TEXT,))
    return replace(run, valid=run.valid or own, test=run.test or own, known=known)


def gather(run: Run, notes: Notes) -> dict[str, list[Row]]:
    """Returns the rows by part, empty ones last. Raises one DataError for all unreadable texts."""
    found = read(run, ("train", "valid", "test", "known"))
    empty = {part: [row for row in rows if row.kind == EMPTY] for part, rows in found.items()}
    found = {part: [row for row in rows if row.kind != EMPTY] for part, rows in found.items()}
    if not found["train"]:
        raise DataError(f"{' '.join(run.data)}: all {len(empty['train'])} rows are empty: nothing to learn")
    if not found["valid"]:
        found["train"], found["valid"] = _set_aside(found["train"], run, notes)
    found["valid"] = [replace(row, times=1) for row in found["valid"]]
    if any(sources.weight(name) != 1 for name in run.data):
        each = sum(row.times for row in found["train"])
        notes.say(
            f"by the weights of {' '.join(run.data)}, an epoch has {each} rows, of {len(found['train'])}"
            f" different places"
        )
    say_what_is_left_out(found, notes)
    say_leaks(found, run, notes)
    return {part: [*rows, *empty[part]] for part, rows in found.items() if rows or empty[part]}


def _set_aside(rows: list[Row], run: Run, notes: Notes) -> tuple[list[Row], list[Row]]:
    """Returns training and valid rows of a run that names no valid text."""
    n = len(rows)
    if not run.chooses:
        sample = sorted(rows, key=lambda row: split.key(row, run.seed))[: max(1, round(SAMPLE * n))]
        notes.say(
            f"{ALL_LEARNED}: all {n} rows are learned and the last step is kept; figures of valid"
            f" text are of"
            f" {len(sample)} learned rows"
        )
        return rows, sample
    train, valid = split.split_off(rows, run.seed)
    part = f"{len(valid)} of {n} rows are" if len(train) < n else "the last tenth of each text is"
    notes.say(f"no valid text is given: {part} set aside to choose the best step by")
    return train, valid


def read(run: Run, parts: Sequence[str]) -> dict[str, list[Row]]:
    """Returns the rows of the parts of a run. Raises one DataError for all unreadable texts."""
    wanted = {
        "train": run.data,
        "valid": run.valid if run.chooses else (),
        "test": run.test,
        "known": () if run.known == (NO_TEXT,) else run.known,
    }
    found: dict[str, list[Row]] = {}
    problems: list[str] = []
    shape = shape_of(run)
    for part in parts:
        names = wanted[part]
        try:
            if part != "train" and (wrong := sources.weighted(names, part)):
                raise DataError("\n".join(wrong))
            found[part] = sources.rows(names, "test" if part == "known" else part, run.seed, shape)
        except DataError as e:
            problems.append(e.text)
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))  # the parts of one built-in text fail alike
    return found


def shape_of(run: Run) -> Shape:
    """Returns the shape of tables' columns, with the task's own kinds of row."""
    task = get(run.task)
    return run.shape._replace(forms=task.FORMS, media=task.MEDIA)


def say_what_is_left_out(found: Mapping[str, Sequence[Row]], notes: Notes) -> None:
    """Says which columns are unused, if text is broken, and if forgetting is not measured."""
    rows = [row for some in found.values() for row in some]
    idle = row_files.unused(rows)
    if idle:
        notes.say(f"unused columns: {first_few(idle)}")
    broken = [row.where for row in rows if "\\ufffd" in leaks.content(row)]  # as JSON writes U+FFFD
    if broken:
        notes.say(f"{len(broken)} rows hold U+FFFD, the mark of broken text: {first_few(broken, 3)}")
    if not found["known"]:
        notes.say("forgetting is not measured: no known text is given")


def say_leaks(found: Mapping[str, Sequence[Row]], run: Run, notes: Notes) -> None:
    """Warns of measured rows that are learned from too."""
    if not run.chooses:
        found = {part: rows for part, rows in found.items() if part != "valid"}
    for part, leak in leaks_in(found).items():
        for sentence in leak.sentences(part, [first_few(names, 3) for names in leak]):
            notes.say(f"{sentence}{FLATTERS}")


def leaks_in(found: Mapping[str, Sequence[Row]]) -> dict[str, leaks.Leaks]:
    """Compares valid and test rows with the training rows."""
    return leaks.find(found["train"], {part: found[part] for part in ("valid", "test") if found.get(part)})


def encode_all(rows: Mapping[str, Sequence[Row]], task: Task) -> dict[str, list[Encoded]]:
    """Returns every part's rows as the task reads them.

    Raises one DataError for all rows that it cannot read.
    """
    found: dict[str, list[Encoded]] = {}
    problems: list[str] = []
    for part, some in rows.items():
        try:
            found[part] = encode_rows(some, task)
        except DataError as e:
            problems.append(e.text)
    if problems:
        raise DataError("\n".join(problems))
    return found


def prepare_all(encoded: Mapping[str, Sequence[Encoded]], task: Task, notes: Notes) -> dict[str, Text]:
    """Returns every part as examples. Raises one DataError for all unusable rows of all parts."""
    found: dict[str, Text] = {}
    problems: list[str] = []
    for part, some in encoded.items():
        try:
            found[part] = text_of(some, task, notes, part)
        except DataError as e:
            problems.append(e.text)
    if problems:
        raise DataError("\n".join(problems))
    return found


def prepare(rows: Sequence[Row], task: Task, notes: Notes, part: str = "text") -> Text:
    """Returns rows as examples. Raises one DataError for all unusable rows."""
    return text_of(encode_rows(rows, task), task, notes, part)


def text_of(encoded: Sequence[Encoded], task: Task, notes: Notes, part: str) -> Text:
    """Returns encoded rows as examples, without rows to leave out.

    Raises one DataError for all unusable rows.
    """
    kept, left_out = _kept(encoded, task, notes, part)
    window = task.reading.window
    pieces = [p for one in kept for _ in range(one.row.times) for p in task.pieces(one, window)]
    examples = task.join(pieces)
    facts = task.facts([one.row for one in kept], pieces, examples)
    return Text(examples, {**facts, **left_out.counts}, left_out, () if part == "train" else kept)


def evaluated(found: Mapping[str, Text], run: Run, task: Task) -> dict[str, list[Any]]:
    """Returns the examples that a training measures, by part."""
    return {
        part: task.evaluated(t.kept, run.eval_windows or 0) for part, t in found.items() if part != "train"
    }


def by_row(rows: Sequence[Row], task: Task, notes: Notes, part: str = "text") -> list[list[Any]]:
    """Returns the pieces of every row to use, at least one each. Raises as `prepare`."""
    kept, _ = _kept(encode_rows(rows, task), task, notes, part)
    return [task.pieces(one, task.reading.window) for one in kept]


def _kept(encoded: Sequence[Encoded], task: Task, notes: Notes, part: str) -> tuple[list[Encoded], LeftOut]:
    kept, left_out = keep(encoded, task, part, notes)
    for sentence in task.remarks(kept):
        notes.say(sentence)
    return kept, left_out


def counted(part: str, facts: Mapping[str, Any], task: Task) -> str:
    """Returns a sentence on the size of a part of a run."""
    counts = ", ".join(f"{facts[k]:,} {k.replace('_', ' ')}" for k in task.FACTS)
    return f"{f'the beginning of {part}' if 'stream' in facts else part}: {counts}"

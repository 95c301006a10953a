"""From the names of texts to windows of tokens, by the part each plays in a run: train, valid, test,"
" known."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from veneer import embedded
from veneer.data import leaks, row_files, split
from veneer.data.chat import ASSISTANT
from veneer.data.forms.columns import EMPTY
from veneer.data.pack import Segment, Window, n_bytes, n_labels, n_tokens, pack
from veneer.data.reading import NO_TEXT, Reading
from veneer.data.row_files import Row
from veneer.errors import DataError, first_few, suggest
from veneer.runs.texts import sources
from veneer.runs.texts.encoded import Encoded, LeftOut, encode_rows, is_endless, keep, segments_of
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

FLATTERS = "; their figures flatter"
SAMPLE = 0.1  # of the training rows: measured in place of valid text where all of it is learned


class Text(NamedTuple):
    """A text ready for the model. facts: for config.json, unchanged when a run resumes; left_out: names"
    " of rows."""

    windows: list[Window]
    facts: dict[str, Any]
    left_out: LeftOut = LeftOut([], [], [])


def named(run: Run) -> Run:
    """Returns the run with the texts that it leaves open: other parts of built-in data, and its known"
    " text."""
    builtin = all(sources.is_builtin(name) for name in run.data)
    # Names without a part of their own.
    own = tuple(sources.plain(name) for name in run.data if name.count(":") == 1) if builtin else ()
    known = run.known or (("builtin:known",) if run.model == embedded.PREFIX else (NO_TEXT,))
    return replace(run, valid=run.valid or own, test=run.test or own, known=known)


def gather(run: Run, voice: Voice) -> dict[str, list[Row]]:
    """Returns the rows by part, empty ones last. Raises one DataError for all unreadable texts."""
    found = read(run, ("train", "valid", "test", "known"))
    empty = {part: [row for row in rows if row.kind == EMPTY] for part, rows in found.items()}
    found = {part: [row for row in rows if row.kind != EMPTY] for part, rows in found.items()}
    if not found["train"]:
        raise DataError(f"{' '.join(run.data)}: all {len(empty['train'])} rows are empty: nothing to learn")
    check_roles(found["train"], run.train_roles)
    if not found["valid"]:
        found["train"], found["valid"] = _set_aside(found["train"], run, voice)
    found["valid"] = [replace(row, times=1) for row in found["valid"]]
    if any(sources.weight(name) != 1 for name in run.data):
        each = sum(row.times for row in found["train"])
        voice.say(
            f"by the weights of {' '.join(run.data)}, an epoch has {each} rows, of {len(found['train'])}"
            f" different places"
        )
    say_what_is_left_out(found, voice)
    say_leaks(found, run, voice)
    return {part: [*rows, *empty[part]] for part, rows in found.items() if rows or empty[part]}


def _set_aside(rows: list[Row], run: Run, voice: Voice) -> tuple[list[Row], list[Row]]:
    """Returns training and valid rows of a run that names no valid text."""
    n = len(rows)
    if not run.chooses:
        sample = sorted(rows, key=lambda row: split.key(row, run.seed))[: max(1, round(SAMPLE * n))]
        voice.say(
            f"valid is {NO_TEXT!r}: all {n} rows are learned and the last step is kept; figures of valid"
            f" text are of"
            f" {len(sample)} learned rows"
        )
        return rows, sample
    train, valid = split.split_off(rows, run.seed)
    part = f"{len(valid)} of {n} rows are" if len(train) < n else "the last tenth of each text is"
    voice.say(f"no valid text is given: {part} set aside to choose the best step by")
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
    for part in parts:
        names = wanted[part]
        try:
            if part != "train" and any(sources.weight(name) != 1 for name in names):
                raise DataError(
                    f"{part}: {' '.join(names)}: a measured text has no weight; remove @ and the number"
                )
            found[part] = sources.rows(names, "test" if part == "known" else part, run.seed, run.shape)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))  # the parts of one built-in text fail alike
    return found


def say_what_is_left_out(found: Mapping[str, Sequence[Row]], voice: Voice) -> None:
    """Says which columns are unused, if text is broken, and if forgetting is not measured."""
    rows = [row for some in found.values() for row in some]
    idle = row_files.unused(rows)
    if idle:
        voice.say(f"columns that are not used: {first_few(idle)}")
    broken = [row.where for row in rows if "\\ufffd" in leaks.content(row)]  # as JSON writes U+FFFD
    if broken:
        voice.say(f"{len(broken)} rows hold U+FFFD, the mark of broken text: {first_few(broken, 3)}")
    if not found["known"]:
        voice.say("forgetting is not measured: no known text (known=) is given")


def say_leaks(found: Mapping[str, Sequence[Row]], run: Run, voice: Voice) -> None:
    """Warns of measured rows that are learned from too."""
    if not run.chooses:
        found = {part: rows for part, rows in found.items() if part != "valid"}
    for part, leak in leaks_in(found).items():
        for sentence in leak.sentences(part, [first_few(names, 3) for names in leak]):
            voice.say(f"{sentence}{FLATTERS}")


def leaks_in(found: Mapping[str, Sequence[Row]]) -> dict[str, leaks.Leaks]:
    """Compares valid and test rows with the training rows."""
    return leaks.find(found["train"], {part: found[part] for part in ("valid", "test") if found.get(part)})


def check_roles(rows: Sequence[Row], wanted: Sequence[str]) -> None:
    """Raises DataError for roles to train that no turn has."""
    there = {m["role"] for row in rows if row.kind == "messages" for m in row.columns["messages"]}
    missing = [r for r in wanted if r not in there]
    if missing and (there or tuple(wanted) != ASSISTANT):
        has = suggest(missing[0], there) if there else "; the rows hold no conversation"
        raise DataError(f"train_roles: no turn is of role {first_few(map(repr, missing))}{has}")


def encode_all(
    rows: Mapping[str, Sequence[Row]], reading: Reading, tokenizer: Any
) -> dict[str, list[Encoded]]:
    """Returns every part's rows as tokens. Raises one DataError for all rows of all parts that have no"
    " tokens."""
    found: dict[str, list[Encoded]] = {}
    problems: list[str] = []
    for part, some in rows.items():
        try:
            found[part] = encode_rows(some, reading, tokenizer)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(problems))
    return found


def prepare_all(
    encoded: Mapping[str, Sequence[Encoded]], reading: Reading, tokenizer: Any, voice: Voice
) -> dict[str, Text]:
    """Returns every part as windows. Raises one DataError for all unusable rows of all parts."""
    found: dict[str, Text] = {}
    problems: list[str] = []
    for part, some in encoded.items():
        try:
            found[part] = windows_of(some, reading, tokenizer, voice, part)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(problems))
    return found


def prepare(rows: Sequence[Row], reading: Reading, tokenizer: Any, voice: Voice, part: str = "text") -> Text:
    """Returns rows as windows of at most reading.length tokens. Raises one DataError for all unusable"
    " rows."""
    return windows_of(encode_rows(rows, reading, tokenizer), reading, tokenizer, voice, part)


def windows_of(encoded: Sequence[Encoded], reading: Reading, tokenizer: Any, voice: Voice, part: str) -> Text:
    """Returns encoded rows as windows, without those to leave out. Raises one DataError for all unusable"
    " rows."""
    kept, left_out = keep(encoded, reading, part, voice)
    _say_endless(kept, reading, tokenizer, voice)
    every = [s for one in kept for _ in range(one.row.times) for s in segments_of(one, reading.window)]
    windows: list[Window] = pack(every, reading.window) if reading.packing else [(s,) for s in every]
    return Text(windows, _facts([one.row for one in kept], windows, every, left_out), left_out)


def by_row(
    rows: Sequence[Row], reading: Reading, tokenizer: Any, voice: Voice, part: str = "text"
) -> list[list[Segment]]:
    """Returns the segments of every row to use, at least one each. Raises as `prepare`."""
    kept, _ = keep(encode_rows(rows, reading, tokenizer), reading, part, voice)
    _say_endless(kept, reading, tokenizer, voice)
    return [segments_of(one, reading.window) for one in kept]


def _say_endless(kept: Sequence[Encoded], reading: Reading, tokenizer: Any, voice: Voice) -> None:
    if endless := sum(is_endless(one, tokenizer, reading) for one in kept):
        voice.say(
            f"in {endless} conversations no end of a turn is learned: the chat template's markers leave it"
            f" out"
        )


def _facts(
    rows: Sequence[Row], windows: Sequence[Window], every: Sequence[Segment], left_out: LeftOut
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for s in every:
        digest.update(s.inputs.numpy().tobytes() + s.labels.numpy().tobytes())
    counts = {
        "tokens": n_tokens(windows),
        "learned_tokens": n_labels(windows),
        "learned_bytes": n_bytes(windows),
    }
    talks = sum(row.kind == "messages" for row in rows)
    own = {**({"conversations": talks} if talks else {}), **left_out.counts}
    return {"rows": len(rows), **own, "windows": len(windows), **counts, "sha256": digest.hexdigest()}


def counted(part: str, facts: Mapping[str, Any]) -> str:
    """Returns a sentence on the size of a part of a run."""
    named = f"the beginning of {part}" if "stream" in facts else part
    return f"{named}: {facts['rows']} rows, {facts['tokens']:,} tokens, {facts['windows']} windows"

"""From the names of texts to windows of tokens, by the part each plays in a run: train, valid, test, known."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from veneer import embedded
from veneer.data import row_files, split
from veneer.data.chat import ASSISTANT, examples
from veneer.data.pack import Segment, Window, n_bytes, n_labels, n_tokens, pack, segments
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.tokens import Tokens, encode
from veneer.errors import DataError, first_few, suggest
from veneer.runs.texts import sources
from veneer.train import checks
from veneer.train.loop.progress import Voice
from veneer.train.run import Run


class Text(NamedTuple):
    """A text ready to be read by the model; `facts` go into config.json and must not change when a run goes on."""

    windows: list[Window]
    facts: dict[str, Any]


def named(run: Run) -> Run:
    """The run with the texts that it leaves open: those that belong to built-in data, and the built-in model's known text."""
    builtin = all(sources.is_builtin(name) for name in run.data)
    own = (
        tuple(sources.plain(name) for name in run.data if name.count(":") == 1) if builtin else ()
    )  # without a part of their own
    known = run.known or (("builtin:known",) if run.model == embedded.PREFIX else ("none",))
    return replace(run, valid=run.valid or own, test=run.test or own, known=known)


def gather(run: Run, voice: Voice) -> dict[str, list[Row]]:
    """Rows by part. Raises one DataError for all that cannot be read."""
    found = read(run, ("train", "valid", "test", "known"))
    check_roles(found["train"], run.train_roles)
    if not found["valid"]:
        n = len(found["train"])
        found["train"], found["valid"] = split.split_off(found["train"], run.seed)
        part = (
            f"{len(found['valid'])} of {n} rows are"
            if len(found["train"]) < n
            else "the last tenth of each text is"
        )
        voice.say(f"no valid text is given: {part} set aside to choose the best step by")
    found["valid"] = [replace(row, times=1) for row in found["valid"]]
    if any(sources.weight(name) != 1 for name in run.data):
        each = sum(row.times for row in found["train"])
        voice.say(
            f"by the weights of {' '.join(run.data)}, an epoch has {each} rows, of {len(found['train'])} different places"
        )
    say_what_is_left_out(found, voice)
    return {part: rows for part, rows in found.items() if rows}


def read(run: Run, parts: Sequence[str]) -> dict[str, list[Row]]:
    """Rows of the parts of a run. Raises one DataError for all that cannot be read."""
    wanted = {
        "train": run.data,
        "valid": run.valid,
        "test": run.test,
        "known": () if run.known == ("none",) else run.known,
    }
    found: dict[str, list[Row]] = {}
    problems: list[str] = []
    for part in parts:
        names = wanted[part]
        try:
            if part != "train" and any(sources.weight(name) != 1 for name in names):
                raise DataError(
                    f"{part}: {' '.join(names)}: a text that is measured has no weight; leave @ and what follows out"
                )
            found[part] = sources.rows(names, "test" if part == "known" else part, run.seed)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))  # the parts of one built-in text fail alike
    return found


def say_what_is_left_out(found: Mapping[str, Sequence[Row]], voice: Voice) -> None:
    """Columns that nothing uses, and that nothing tells of forgetting."""
    idle = row_files.unused(row for rows in found.values() for row in rows)
    if idle:
        voice.say(f"columns that are not used: {first_few(idle)}")
    if not found["known"]:
        voice.say("forgetting is not measured: no known text (known=) is given")


def check_roles(rows: Sequence[Row], wanted: Sequence[str]) -> None:
    """Raises DataError for roles to train that no turn has."""
    there = {m["role"] for row in rows if row.kind == "messages" for m in row.columns["messages"]}
    missing = [r for r in wanted if r not in there]
    if missing and (there or tuple(wanted) != ASSISTANT):
        has = suggest(missing[0], there) if there else "; none of the rows is a conversation"
        raise DataError(f"train_roles: no turn is of role {first_few(map(repr, missing))}{has}")


def encode_row(row: Row, reading: Reading, tokenizer: Any) -> list[Tokens]:
    """Returns the row's examples as tokens; a conversation may have several."""
    return [encode(one, tokenizer) for one in examples(row, tokenizer, reading.train_on, reading.train_roles)]


def is_endless(row: Row, encoded: Sequence[Tokens], tokenizer: Any, reading: Reading) -> bool:
    """Tells if a conversation has end tokens and learns none of them, so that the model would not learn to stop."""
    if row.kind != "messages" or "assistant" not in reading.train_roles:
        return False
    end, ids = tokenizer.eos_token_id, [i for t in encoded for i in t.ids.tolist()]
    learned = [i for t in encoded for i in t.ids[t.learned].tolist()]
    return bool(learned) and end in ids and end not in learned


def prepare_all(
    rows: Mapping[str, Sequence[Row]], reading: Reading, tokenizer: Any, voice: Voice
) -> dict[str, Text]:
    """Every part's rows as windows. Raises one DataError for all rows of all parts that cannot be used."""
    found: dict[str, Text] = {}
    problems: list[str] = []
    for part, some in rows.items():
        try:
            found[part] = prepare(some, reading, tokenizer, voice)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(problems))
    return found


def prepare(rows: Sequence[Row], reading: Reading, tokenizer: Any, voice: Voice) -> Text:
    """Rows as windows of at most reading.length tokens. Raises one DataError for all rows that are too long or teach nothing."""
    found = by_row(rows, reading, tokenizer, voice)
    every = [s for row, own in zip(rows, found, strict=True) for _ in range(row.times) for s in own]
    windows: list[Window] = pack(every, reading.length) if reading.packing else [(s,) for s in every]
    return Text(windows, _facts(rows, windows, every))


def by_row(rows: Sequence[Row], reading: Reading, tokenizer: Any, voice: Voice) -> list[list[Segment]]:
    """The segments of every row, at least one each. Raises as `prepare`."""
    encoded = [encode_row(row, reading, tokenizer) for row in rows]
    if endless := sum(
        is_endless(row, own, tokenizer, reading) for row, own in zip(rows, encoded, strict=True)
    ):
        voice.say(
            f"in {endless} conversations no end of a turn is learned: the markers of the tokenizer's chat template leave it out"
        )
    long = [
        (row.where, max(len(t.ids) for t in own) - 1)
        for row, own in zip(rows, encoded, strict=True)
        if row.kind != "text"
    ]
    if not reading.truncates:
        checks.check_overlong(long, reading.length)
    elif n_long := sum(n > reading.length for _, n in long):
        voice.say(f"{n_long} rows are cut off at length={reading.length} tokens")
        encoded = [
            own if row.kind == "text" else [t.first(reading.length + 1) for t in own]
            for row, own in zip(rows, encoded, strict=True)
        ]
    found = [[s for t in own for s in segments(t, reading.length)] for own in encoded]
    idle = [row.where for row, own in zip(rows, found, strict=True) if not own]
    if idle:
        raise DataError(
            f"{len(idle)} rows have no token to learn (every label is masked): {first_few(idle)};"
            f" give them a completion, or use train_on='all'"
        )
    return found


def _facts(rows: Sequence[Row], windows: Sequence[Window], every: Sequence[Segment]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for s in every:
        digest.update(s.inputs.numpy().tobytes() + s.labels.numpy().tobytes())
    counts = {
        "tokens": n_tokens(windows),
        "learned_tokens": n_labels(windows),
        "learned_bytes": n_bytes(windows),
    }
    talks = sum(row.kind == "messages" for row in rows)
    own = {"conversations": talks} if talks else {}
    return {"rows": len(rows), **own, "windows": len(windows), **counts, "sha256": digest.hexdigest()}


def counted(part: str, facts: Mapping[str, Any]) -> str:
    """What was read of a part of a run, in words."""
    named = f"the beginning of {part}" if "stream" in facts else part
    return f"{named}: {facts['rows']} rows, {facts['tokens']:,} tokens, {facts['windows']} windows"

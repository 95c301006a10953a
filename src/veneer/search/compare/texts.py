"""Completes the texts of a comparison: rates are chosen on valid text, scores reported on test text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.data import split
from veneer.data.forms.columns import EMPTY
from veneer.data.reading import NO_TEXT
from veneer.data.row_files import Row
from veneer.errors import ConfigError, option
from veneer.files import replacing, unusable
from veneer.models import machine
from veneer.runs.decide import decided
from veneer.runs.fit import lay_out
from veneer.runs.prepare import read
from veneer.runs.texts import texts
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run

FOLDER = "texts"


def shared(run: Run, out: Path, voice: Voice) -> tuple[Run, int]:
    """Returns the settings that all trials share, without a rate, and the steps of a training.

    Reads all texts, so that rows that do not fit are refused before any training. Raises the errors of `fit`.
    """
    if problem := unusable(out, new=False):
        raise ConfigError(problem)
    with voice.phase("reading texts"):
        found = complete(run, out, voice)
        rated = replace(found, lr=found.lr or 1.0)
        looked, task, held = read(decided(rated, machine.device(run.device)), voice)
    steps = lay_out(looked, task, held["train"].examples)[0].steps
    return replace(found, length=looked.length, lr=None), steps


def complete(run: Run, out: Path, notes: Notes) -> Run:
    """Returns the run with valid and test text; missing ones are tenths of data, written into `out`.

    All trials then see the same parts, whatever their seed. Raises ConfigError where no part can be set
    aside.
    """
    run = texts.named(run)
    if run.valid == (NO_TEXT,):
        none, valid = option("valid", NO_TEXT), option("valid")
        raise ConfigError(f"{none} leaves no text to choose rates on; give {valid}, or leave it out")
    missing = [part for part in ("test", "valid") if not getattr(run, part)]
    if not missing:
        return run
    if run.stream:
        wanted = " and ".join(option(part) for part in sorted(missing))
        raise ConfigError(f"{option('stream')} sets no text aside; give {wanted}")
    made = {part: out / FOLDER / f"{part}.jsonl" for part in ("train", *missing)}
    if not all(path.is_file() for path in made.values()):
        _write(run, made, missing)
    rows = {part: sum(1 for _ in path.open(encoding="utf-8")) for part, path in made.items()}
    set_aside = " and ".join(f"{rows[part]} rows as {part} text" for part in missing)
    notes.say(f"set aside from data: {set_aside}; {rows['train']} rows are learned ({out / FOLDER})")
    parts: dict[str, Any] = {part: (str(path),) for part, path in made.items() if part != "train"}
    return replace(run, data=(str(made["train"]),), columns={}, prompt_template=None, **parts)


def _write(run: Run, made: dict[str, Path], missing: Sequence[str]) -> None:
    rows = [row for row in texts.read(run, ("train",))["train"] if row.kind != EMPTY]
    parts: dict[str, list[Row]] = {}
    for part in missing:
        rows, parts[part] = split.split_off(rows, run.seed)
    parts["train"] = [row for row in rows for _ in range(row.times)]
    try:
        lines = {
            part: [json.dumps(row.columns, ensure_ascii=False) + "\n" for row in some]
            for part, some in parts.items()
        }
    except TypeError:
        wanted = " and ".join(option(part) for part in sorted(missing))
        raise ConfigError(f"rows of task {run.task!r} hold more than text; give {wanted}") from None
    with replacing(*made.values()) as temporary:
        for part, path in zip(made, temporary, strict=True):
            path.write_text("".join(lines[part]), encoding="utf-8", errors="surrogatepass")

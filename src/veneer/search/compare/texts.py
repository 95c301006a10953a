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
from veneer.files import replacing
from veneer.runs.texts import texts
from veneer.train.loop.progress import Notes
from veneer.train.run import Run

FOLDER = "texts"


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

"""`veneer data show`: rows as the model reads them, token by token, with what is learned of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from veneer.data.reading import NO_TEXT
from veneer.errors import ConfigError, option
from veneer.runs.prepare import encoded_texts
from veneer.runs.texts import texts
from veneer.tasks.base.abilities import surveyed
from veneer.train.loop.progress import Notes
from veneer.train.run import Run


def show(run: Run, rows: int = 3) -> dict[str, Any]:
    """Returns the first rows of the training text, token by token.

    {"shown": rows, "of": all rows, "rows": [{where, kind, length, learned, special, spelt,
    too_long, tokens: [{id, text, learned}]}], "notes": [..]}; a conversation with several examples has an
    entry for each. The first token has no label. Raises the errors of unreadable texts.
    """
    if rows < 1:
        raise ConfigError(f"{option('rows', rows)} must be 1 or more")
    notes, run = Notes(), texts.named(run)
    if not run.valid:  # nothing is chosen here: a row set aside would not be shown
        run = replace(run, valid=(NO_TEXT,))
    run, task, encoded = encoded_texts(run, notes)
    task, found = surveyed(task, run.task), encoded["train"]
    return {
        "model": run.model,
        "length": run.window,
        "shown": min(rows, len(found)),
        "of": len(found),
        "rows": [entry for one in found[:rows] for entry in task.entries(one)],
        "notes": [said for said in notes.said if not said.startswith(texts.ALL_LEARNED)],
    }

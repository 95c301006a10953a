"""Decides the length of a run's examples, if the run leaves it open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from veneer.data import lengths
from veneer.data.reading import AUTO
from veneer.errors import ConfigError
from veneer.models import pretrained
from veneer.tasks import get
from veneer.tasks.base.encoded import Encoded
from veneer.train.folder import drift, layout
from veneer.train.loop.progress import Notes
from veneer.train.run import Run


def as_begun(run: Run) -> Run:
    """Returns a resumed run that reads and measures as it began: defaults of older versions were others."""
    if not _goes_on(run):
        return run
    then = drift.record(Path(run.out))["run"]
    kept = {k: then[k] for k in ("special_tokens", "eval_by") if getattr(run, k) == getattr(Run, k)}
    return replace(run, **kept)


def _goes_on(run: Run) -> bool:
    return run.resume and (Path(run.out) / layout.CONFIG).exists()


def with_length(run: Run, encoded: Sequence[Encoded], notes: Notes) -> Run:
    """Returns the run with its length decided: as the run began, or from the rows and the model's context."""
    if run.length != AUTO:
        return run
    if _goes_on(run):
        return replace(run, length=drift.record(Path(run.out))["run"]["length"])
    if "length" not in get(run.task).SETTINGS:
        return replace(run, length=lengths.LEAST)
    choice = lengths.choose([one.whole for one in encoded if one.whole is not None], _context(run))
    notes.say(choice.reason)
    return replace(run, length=choice.length)


def _context(run: Run) -> int | None:
    try:
        config = pretrained.config(run.model)
    except ConfigError:
        return None  # opening the model raises the same error later
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found

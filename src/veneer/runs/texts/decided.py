"""Decides what a run leaves open about its texts: the chat template and the longest window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.data import lengths
from veneer.data.chat import templates
from veneer.data.reading import AUTO
from veneer.data.row_files import Row
from veneer.errors import ConfigError
from veneer.models import pretrained
from veneer.runs.texts.encoded import Encoded
from veneer.train.folder import drift, layout
from veneer.train.loop.progress import Voice
from veneer.train.run import Run


def tokenizer_of(run: Run, voice: Voice) -> Any:
    """Returns the model's tokenizer, with the chat template of the run. Raises ConfigError."""
    tokenizer = pretrained.tokenizer(run.model)
    for note in templates.choose(tokenizer, run.chat_template):
        voice.say(note)
    return tokenizer


def say_template(rows: Mapping[str, Sequence[Row]], tokenizer: Any, voice: Voice) -> None:
    """Says that conversations get the plain template, if the tokenizer lacks one."""
    if not tokenizer.chat_template and any(row.kind == "messages" for some in rows.values() for row in some):
        voice.say(
            f"the tokenizer has no chat template: conversations are written by {templates.PLAIN!r}, which"
            f" is saved"
            f" with the adapter; chat_template chooses another one"
        )


def with_length(run: Run, encoded: Sequence[Encoded], voice: Voice) -> Run:
    """Returns the run with its length decided: as the run began, or from the rows and the model's context."""
    if run.length != AUTO:
        return run
    begun = Path(run.out)
    if run.resume and (begun / layout.CONFIG).exists():
        return replace(run, length=drift.record(begun)["run"]["length"])
    choice = lengths.choose(
        [one.whole for one in encoded if one.whole is not None and one.examples], _context(run)
    )
    voice.say(choice.reason)
    return replace(run, length=choice.length)


def _context(run: Run) -> int | None:
    try:
        config = pretrained.config(run.model)
    except ConfigError:
        return None  # opening the model raises the same error later
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found

"""Keeps an adapter's task and its options beside it, so that another program can ask the model alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.files import read_json, replacing, write_json
from veneer.tasks import DEFAULT

NAME = "task.json"


def write(folder: Path, task: str, options: Mapping[str, Any]) -> None:
    """Writes the task into an adapter's folder, unless it is plain language modelling."""
    if task == DEFAULT:
        (folder / NAME).unlink(missing_ok=True)
        return
    with replacing(folder / NAME) as (temporary,):
        write_json(temporary, {"task": task, "options": dict(options)})


def read(folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns the task of an adapter's folder and its options. Raises FormatError for a damaged file."""
    if not (folder / NAME).is_file():
        return DEFAULT, {}
    found = read_json(folder / NAME, ("task", "options"))
    return found["task"], found["options"]

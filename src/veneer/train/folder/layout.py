"""A run's folder: what is in it, whether it is free for a new run, and its metrics line by line.

config.json  metrics.jsonl  results.json  rows.json  lock  adapter/  checkpoints/step-N/
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, FormatError, option
from veneer.files import replacing, unusable, write_json
from veneer.train.errors import NotSaved

CONFIG, METRICS, RESULTS, ADAPTER, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "results.json",
    "adapter",
    "checkpoints",
)
BASE = "base"  # quantised layers that no other run has
LEFT_OUT = "rows.json"  # names of rows that were left out or cut, by part and reason


def check_free(folder: Path, resume: bool) -> None:
    """Raises ConfigError if the folder holds a run, or anything else, and is not to be resumed."""
    if problem := unusable(folder, new=False):
        raise ConfigError(problem)
    if folder.is_file():
        raise ConfigError(f"{option('out')} {folder} is a file; name a folder")
    if (folder / CONFIG).exists() and not resume:
        state = "finished" if (folder / RESULTS).exists() else "unfinished"
        raise ConfigError(
            f"{option('out')} {folder} holds another run ({state});"
            f" go on with it by {option('resume', True)}, or choose another folder"
        )
    if folder.is_dir() and not (folder / CONFIG).exists() and any(p.name != "lock" for p in folder.iterdir()):
        raise ConfigError(f"{option('out')} {folder} is not empty and holds no run; choose another folder")


def put(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file, whole or not there."""
    with replacing(path) as (temporary,):
        write_json(temporary, content)


class Metrics:
    """metrics.jsonl: one JSON object a line, in the order of steps."""

    def __init__(self, folder: Path, n_bytes: int) -> None:
        """Goes on after the first n_bytes of the file; what came later is dropped. Raises FormatError if it is shorter."""
        self.path = folder / METRICS
        self.path.touch()
        there = self.path.stat().st_size
        if there < n_bytes:
            raise FormatError(
                f"{self.path} has {there} bytes, but {n_bytes} when the checkpoint was written; restore it, or begin anew"
            )
        os.truncate(self.path, n_bytes)
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line, which other programs see at once. Raises NotSaved if there is no room for it."""
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as e:
            raise NotSaved(
                f"{len(text)} bytes could not be added to {self.path}: {e}; the checkpoints are untouched"
            ) from e

    def sync(self) -> int:
        """Has the file written to the disk: its length in bytes."""
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Ends the writing; what a full disk took no more is given up."""
        with suppress(OSError):
            self.file.close()

"""A run's folder: its files, the check that it is free for a new run, and its metrics line by line.

config.json  metrics.jsonl  results.json  rows.json  lock  adapter/  checkpoints/step-N/
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from veneer.errors import ConfigError, FormatError, option
from veneer.files import blocks, left_over, replacing, unusable, write_json
from veneer.train.errors import NotSaved

CONFIG, METRICS, RESULTS, ADAPTER, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "results.json",
    "adapter",
    "checkpoints",
)
LEFT_OUT = "rows.json"  # names of rows that were left out or cut, by part and reason
BASE = "base"  # quantised layers of this run alone


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
    if folder.is_dir() and not (folder / CONFIG).exists() and not _only_begun(folder):
        raise ConfigError(f"{option('out')} {folder} is not empty and holds no run; choose another folder")


def _only_begun(folder: Path) -> bool:
    """Tells if the folder holds nothing but the files of a beginning that ended before config.json."""
    own = {"lock", LEFT_OUT, BASE, f"{BASE}/quantised.safetensors", f"{BASE}/quantised.json"}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    return there <= own | {p.relative_to(folder).as_posix() for p in left_over(folder)}


def put(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file in one step: readers see all of it or the one before."""
    with replacing(path) as (temporary,):
        write_json(temporary, content)


class Written(NamedTuple):
    """The beginning of metrics.jsonl that a checkpoint vouches for. sha256: None in older checkpoints."""

    n_bytes: int = 0
    sha256: str | None = None


class Metrics:
    """metrics.jsonl: one JSON object a line, in the order of steps."""

    def __init__(self, folder: Path, begun: Written, *, writes: bool = True) -> None:
        """Continues after the beginning that a checkpoint vouches for; later bytes are dropped.

        writes: False in all but the first process. Raises FormatError if the file has another beginning.
        """
        self.path, self.digest = folder / METRICS, hashlib.sha256()
        self.file: IO[str] | None = None
        if not writes:
            return
        self.path.touch()
        self._check(begun)
        os.truncate(self.path, begun.n_bytes)
        self.file = open(self.path, "a", encoding="utf-8", newline="")

    def _check(self, begun: Written) -> None:
        there = self.path.stat().st_size
        if there < begun.n_bytes:
            raise FormatError(
                f"{self.path} must have {begun.n_bytes} bytes or more, as at its checkpoint, got {there};"
                " restore it or start in another folder"
            )
        with self.path.open("rb") as f:
            for block in blocks(f, begun.n_bytes):
                self.digest.update(block)
        if begun.sha256 not in (None, self.digest.hexdigest()):
            raise FormatError(
                f"the first {begun.n_bytes} bytes of {self.path} have changed since their checkpoint;"
                " restore it or start in another folder"
            )

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line, which other programs see at once. Raises NotSaved on a full disk."""
        if self.file is None:
            return
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as e:
            raise NotSaved(
                f"{len(text)} bytes could not be added to {self.path}: {e}; the checkpoints are untouched"
            ) from e
        self.digest.update(text.encode())

    def sync(self) -> Written:
        """Writes the file to the disk and returns its length and hash."""
        if self.file is None:
            return Written()
        os.fsync(self.file.fileno())
        return Written(self.path.stat().st_size, self.digest.hexdigest())

    def close(self) -> None:
        """Closes the file; ignores errors of a full disk."""
        if self.file is None:
            return
        with suppress(OSError):
            self.file.close()

"""Chooses the files of a folder that a part of a run reads."""

from __future__ import annotations

import re
from pathlib import Path

from veneer.data import dataset_info, tables
from veneer.errors import DataError, first_few

ROWS = (".jsonl", *tables.WRITTEN, *tables.ARROW)
TEXTS = (".txt", ".md")
# The beginnings of names that say which part a file or folder belongs to.
PARTS = {
    "train": re.compile(r"train(?![a-z])"),
    "valid": re.compile(r"(validation|valid|val|dev|eval)(?![a-z])"),
    "test": re.compile(r"test(?![a-z])"),
}


def files(folder: Path, part: str) -> list[Path]:
    """Returns the folder's files for a part of a run, by name; files of rows only, if there are any.

    A file belongs to a part if its name or that of a folder above it begins with a split's name, such as
    train or valid. Without such names every file belongs to the part. Raises DataError if no file is left.
    """
    every = sorted(p for p in folder.rglob("*") if p.is_file() and is_shown(p.relative_to(folder)))
    found = [p for p in every if p.suffix.lower() in ROWS and p.name != dataset_info.NAME]
    found = found or [p for p in every if p.suffix.lower() in TEXTS]
    if not found:
        there = first_few((p.name for p in every), 3) or "it is empty"
        raise DataError(f"{folder}: the folder must hold {', '.join((*ROWS, *TEXTS))} files, got {there}")
    parts = {path: part_of(path.relative_to(folder)) for path in found}
    if not any(parts.values()):
        return found
    wanted = part if part in parts.values() or part != "train" else ""  # unnamed files are for training
    own = [path for path, found_part in parts.items() if found_part == wanted]
    if not own:
        splits = ", ".join(sorted({name for name in parts.values() if name}))
        raise DataError(f"{folder}: the folder has no files for {part}, got {splits}; name files instead")
    return own


def is_shown(path: Path) -> bool:
    """Tells if no step of a path is hidden."""
    return not any(step.startswith((".", "_")) for step in path.parts)


def part_of(path: Path) -> str:
    """Returns the part of a run that a file's name or folder says, or an empty string."""
    return next((part for step in path.parts for part, name in PARTS.items() if name.match(step)), "")

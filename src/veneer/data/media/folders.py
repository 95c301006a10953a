"""Reads a folder of pictures or clips as rows: a folder per class, or a file of text beside each."""

from __future__ import annotations

from pathlib import Path

from veneer.data import folders, row_files
from veneer.data.forms.media import Media
from veneer.data.row_files import Row
from veneer.errors import DataError, first_few, listed


def rows(folder: Path, part: str, media: Media) -> list[Row] | None:
    """Returns the rows of a part of a run, sorted by name; None for a folder with a table of rows.

    Folders at the top called train, valid, test (or similar) are the parts; other folders at the top are
    classes. Raises one DataError for all files without a label or text, and for a folder without such files.
    """
    every = sorted(p for p in folder.rglob("*") if p.is_file() and folders.is_shown(p.relative_to(folder)))
    if any(p.suffix.lower() in folders.ROWS for p in every):
        return None
    top = _of_part(folder, part)
    found = [p for p in every if p.suffix.lower() in media.endings and p.is_relative_to(top)]
    if not found:
        there = first_few((p.name for p in every), 3) or "it is empty"
        raise DataError(f"{top}: the folder must hold {', '.join(media.endings)} files, got {there}")
    problems, made = [], []
    for path in found:
        try:
            columns = {media.column: str(path), media.label: _label(path, top, media)}
            made.append(Row(media.column, columns, str(path)))
        except DataError as e:
            problems.append(str(e))
    if media.beside:
        problems += _alone(top, every, media)
    if problems:
        raise DataError("\n".join(listed(problems, "file")))
    return made


def _of_part(folder: Path, part: str) -> Path:
    """Returns the folder of a part: one at the top of that name, or the whole folder if none names a part."""
    tops = [p for p in sorted(folder.iterdir()) if p.is_dir() and folders.is_shown(p.relative_to(folder))]
    named = {folders.part_of(Path(p.name)): p for p in tops}
    if not tops or "" in named:
        return folder
    if part not in named:
        raise DataError(
            f"{folder}: the folder has no folder for {part}, got {first_few(p.name for p in tops)}"
        )
    return named[part]


def _label(path: Path, top: Path, media: Media) -> str:
    if not media.beside:
        if path.parent == top:
            raise DataError(f"{path}: the file must be in a folder named after its class, got none")
        return path.relative_to(top).parts[0]
    text = path.with_suffix(media.beside)
    if not text.is_file():
        raise DataError(f"{path}: {text.name}, the text beside it, is missing")
    words = row_files.decode(text).strip()
    if not words:
        raise DataError(f"{text}: the file is empty")
    return words


def _alone(top: Path, every: list[Path], media: Media) -> list[str]:
    """Returns a sentence for every file of text without its picture or clip."""
    names = {p.with_suffix("") for p in every if p.suffix.lower() in media.endings}
    texts = [p for p in every if p.suffix.lower() == media.beside and p.is_relative_to(top)]
    return [
        f"{p}: the {media.column} that it describes, {p.stem}{media.endings[0]} or similar, is missing"
        for p in texts
        if p.with_suffix("") not in names
    ]

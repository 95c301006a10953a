"""Reads sources as rows: files, datasets, and texts of the Python interpreter; each may have a weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from veneer import embedded
from veneer.data import dataset_info, folders, hub, row_files_streamed, tables
from veneer.data.forms.shape import AS_IS, Shape
from veneer.data.media import folders as media_folders
from veneer.data.repeats import weigh
from veneer.data.row_files import REFUSED, Row, read_files
from veneer.embedded import names as asked
from veneer.embedded import texts
from veneer.errors import DataError, option, suggest

ASKED = {"names": asked.pairs, "passages": asked.passages}  # rows of prompt and completion
NAMES = (*texts.DOMAINS, "known", *ASKED)
WEIGHTED = re.compile(r"(?P<name>.+)@(?P<weight>\d+(\.\d+)?)")
FILES = (
    ".txt",
    ".md",
    ".jsonl",
    *tables.WRITTEN,
    *tables.ARROW,
    *REFUSED,
)  # endings that no dataset's name has


def rows(names: Iterable[str], split: str, seed: int = 0, shape: Shape = AS_IS) -> list[Row]:
    """Returns the rows of all sources. Raises one DataError for all unreadable sources.

    split: the part of a built-in text, data set or folder to take, unless the name says one.
    seed: decides which rows a source with a broken weight repeats; shape: of the columns of tables.
    """
    found: list[Row] = []
    problems: list[str] = []
    for name in names:
        try:
            found += weigh(_read(plain(name), split, seed, shape), weight(name), seed)
        except DataError as e:
            problems.append(e.text)
    if problems:
        raise DataError("\n".join(problems))
    return found


def weight(name: str) -> float:
    """Returns 3 for a.jsonl@3, and 1 for a source without a weight. Raises DataError for 0."""
    _, times = _parted(name)
    if times is not None and not float(times):
        raise DataError(f"{name}: weight must be above 0, got {times}; leave the source out")
    return 1.0 if times is None else float(times)


def weighted(names: Iterable[str], part: str) -> list[str]:
    """Returns a sentence if sources of a measured text have a weight, else nothing."""
    found = [name for name in names if weight(name) != 1]
    advice = "remove @ and the number"
    return [f"{part}: {' '.join(found)}: a measured text has no weight; {advice}"] if found else []


def plain(name: str) -> str:
    """Returns the source without its weight."""
    return _parted(name)[0]


def _parted(name: str) -> tuple[str, str | None]:
    given = WEIGHTED.fullmatch(name)
    return (name, None) if given is None or Path(name).exists() else (given["name"], given["weight"])


def _read(name: str, split: str, seed: int, shape: Shape) -> list[Row]:
    kind = _kind(name)
    if kind == "builtin":
        return _builtin(name, split, shape)
    if kind == "listed":
        listed = _listed(name, shape)
        found = _read(listed.source, split, seed, listed.shape)
        return found if listed.n is None else weigh(found, listed.n / len(found), seed)
    if kind == "folder":
        return hub.from_folder(*_folder(name), split, shape)
    if kind == "files":
        media = media_folders.rows(Path(name), split, shape.media) if shape.media else None
        return media or read_files(folders.files(Path(name), split), shape)
    return hub.from_hub(name, split, shape) if kind == "hub" else read_files([Path(name)], shape)


def _listed(name: str, shape: Shape) -> dataset_info.Listed:
    """Returns a data set of a dataset_info.json. Raises DataError if the run names columns too."""
    if shape.is_given:
        raise DataError(
            f"{name}: {dataset_info.NAME} names the columns already;"
            f" leave {option('columns')} and {option('prompt_template')} out"
        )
    found = dataset_info.parted(name)
    assert found is not None, name
    return dataset_info.find(*found, shape)


def stream(name: str, split: str, shape: Shape = AS_IS) -> Iterator[Row]:
    """Yields the rows of a source, read as needed. Raises DataError for a source that cannot be streamed."""
    kind = _kind(name)
    if kind == "builtin":
        return iter(_builtin(name, split, shape))
    if kind == "listed":
        listed = _listed(name, shape)
        return islice(stream(listed.source, split, listed.shape), listed.n)
    if kind == "file":
        return row_files_streamed.stream_file(Path(name), shape)
    if kind == "files":
        if shape.media and (media := media_folders.rows(Path(name), split, shape.media)):
            return iter(media)
        files = folders.files(Path(name), split)
        return chain.from_iterable(row_files_streamed.stream_file(path, shape) for path in files)
    return row_files_streamed.stream_rows(
        hub.entries(
            *(
                hub.open_folder(*_folder(name), split)
                if kind == "folder"
                else hub.open_on_hub(name, split, streaming=True)
            )
        ),
        shape,
    )


def _kind(name: str) -> str:
    """Returns where a source is read from: builtin, folder (of a dataset), files, listed, hub, or file."""
    path, head = Path(name), name.rpartition(":")[0]
    if is_builtin(name):
        return "builtin"
    if (path.is_dir() and hub.is_folder(path)) or (head and hub.is_folder(Path(head))):
        return "folder"
    if path.is_dir():
        return "files"
    if dataset_info.parted(name) is not None:
        return "listed"
    return (
        "hub"
        if hub.NAME.fullmatch(name) and not path.parent.is_dir() and path.suffix.lower() not in FILES
        else "file"
    )


def _folder(name: str) -> tuple[Path, str]:
    """Returns a dataset's folder, and the split in its name."""
    if Path(name).is_dir():
        return Path(name), ""
    head, _, tail = name.rpartition(":")
    return Path(head), tail


def is_builtin(name: str) -> bool:
    """Tells if a source is one of the interpreter's own texts: builtin:prose, builtin:c:valid, .."""
    return name.startswith(f"{embedded.PREFIX}:")


def _builtin(name: str, split: str, shape: Shape) -> list[Row]:
    if not shape.reads_text:
        raise DataError(f"{name}: columns must be {shape.wanted}, got plain text; give files with columns")
    domain, _, own = name.removeprefix(f"{embedded.PREFIX}:").partition(":")
    part = own or split
    if domain not in NAMES:
        raise DataError(f"{name}: unknown built-in text {domain!r}{suggest(domain, NAMES)}")
    parts = ("valid", "test") if domain == "known" else texts.SPLITS
    if part not in parts:
        raise DataError(f"{name}: the part of {domain!r} must be one of {', '.join(parts)}, got {part!r}")
    try:
        if domain in ASKED:
            return [Row("pair", row, f"{name} {row['prompt']}") for row in ASKED[domain](part)]
        documents = texts.known(part) if domain == "known" else texts.domain(domain, part)
    except texts.TextMissing as e:
        raise DataError(f"{name}: {e}") from None
    return [Row("text", {"text": d.text}, f"{name} {d.title}") for d in documents]

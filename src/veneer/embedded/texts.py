"""Texts of the built-in model, read from the user's own interpreter at run time and never copied.

library   source of the standard library without held-out modules: the training text
known     held-out modules: unseen text of the known kind, on which forgetting is measured
prose     pydoc's topics, English reference prose: the near domain
c         CPython's C headers, if installed: the far domain
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOMAINS = ("prose", "c")
SPLITS = ("train", "valid", "test")
PARAGRAPH = 80  # least characters of a paragraph that ties two documents together if they share it
SKIPPED = (
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "encodings",
    "lib-dynload",
    "__pycache__",
    "_sysconfigdata",
)


@dataclass(frozen=True)
class Document:
    """One file or topic; `title` is the same on every machine."""

    title: str
    text: str


class TextMissing(RuntimeError):
    """The interpreter lacks the requested text."""


def library(tests: bool = True) -> list[Document]:
    """Returns the training text: all modules but the held-out ones; `tests` adds the test packages."""
    held = {title for titles in heldout().values() for title in titles}
    every = ((f, _relative(f)) for f in sorted(_stdlib().rglob("*.py")))
    found = (f for f, title in every if title not in held and not any(part in title for part in SKIPPED))
    return list(_unique(_read(f for f in found if tests or not is_test(_relative(f)))))


def is_test(title: str) -> bool:
    """Returns True if a library file belongs to a test package."""
    return any(part in ("test", "tests", "idle_test") for part in title.split("/")[:-1])


def heldout() -> dict[str, list[str]]:
    """Returns {"valid": [..], "test": [..]}: the committed list of modules that the model never saw."""
    titles: dict[str, list[str]] = {"valid": [], "test": []}
    for line in Path(__file__).with_name("heldout.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            split, title = line.split(maxsplit=1)
            titles[split].append(title)
    return titles


def known(split: str) -> list[Document]:
    """Returns the held-out modules of a split ("valid" or "test"). Raises TextMissing if all are missing."""
    documents = list(_read(_stdlib() / title for title in heldout()[split]))
    if not documents:
        raise TextMissing(
            f"the held-out modules are missing in {_stdlib()}; install the standard library as source"
        )
    return documents


def domain(name: str, split: str) -> list[Document]:
    """Returns documents of "prose" or "c" in "train", "valid" or "test". Raises TextMissing without any."""
    documents = {"prose": _topics, "c": _headers}[name]()
    groups = _related(documents) if name == "prose" else [[d] for d in documents]
    if not documents:
        where = {"prose": "pydoc_data.topics", "c": sysconfig.get_path("include")}[name]
        raise TextMissing(f"the interpreter lacks the text {name!r} ({where} is missing or empty)")
    return _split(groups)[split]


def has(name: str) -> bool:
    """Returns True if the interpreter has text of the domain."""
    return bool({"prose": _topics, "c": _headers}[name]())


def describe(documents: list[Document]) -> dict[str, Any]:
    """Returns number, bytes and SHA-256 of the documents; runs record them, because interpreters differ."""
    digest = hashlib.sha256()
    for d in documents:
        digest.update(d.title.encode() + b"\0" + d.text.encode() + b"\0")
    return {
        "documents": len(documents),
        "bytes": sum(len(d.text.encode()) for d in documents),
        "sha256": digest.hexdigest(),
    }


def _topics() -> list[Document]:
    try:
        from pydoc_data import topics  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return []
    return [Document(title, text) for title, text in sorted(topics.topics.items())]


def _headers() -> list[Document]:
    root = Path(sysconfig.get_path("include"))
    if not (root / "Python.h").is_file():
        return []
    return list(_unique(_read(sorted(root.rglob("*.h")), root)))


def _split(groups: list[list[Document]]) -> dict[str, list[Document]]:
    """Splits groups by the hash of their titles: a tenth of the characters each to test and valid."""
    groups = sorted(groups, key=lambda g: hashlib.sha256(g[0].title.encode()).digest())
    room = dict.fromkeys(("test", "valid"), sum(len(d.text) for g in groups for d in g) // 10)
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for group in groups:
        size = sum(len(d.text) for d in group)
        split = next((s for s, left in room.items() if size <= left), "train")
        parts[split] += group
        if split in room:
            room[split] -= size
    return parts


def _related(documents: list[Document]) -> list[list[Document]]:
    """Groups documents that share a paragraph.

    pydoc repeats many sections in several topics; split apart, they would leak into the test text.
    """
    group = {d.title: [d] for d in documents}
    first: dict[str, str] = {}
    for d in documents:
        for paragraph in d.text.split("\n\n"):
            words = " ".join(paragraph.split())
            other = first.setdefault(words, d.title) if len(words) >= PARAGRAPH else d.title
            if group[other] is not group[d.title]:
                group[other] += group[d.title]
                group |= {member.title: group[other] for member in group[d.title]}
    return list({id(g): g for g in group.values()}.values())


@functools.cache
def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _relative(file: Path) -> str:
    return file.relative_to(_stdlib()).as_posix()


def _read(files: Iterable[Path], root: Path | None = None) -> Iterator[Document]:
    """Yields files that are valid UTF-8; a few test files have other encodings."""
    for file in files:
        try:
            yield Document(file.relative_to(root or _stdlib()).as_posix(), file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, FileNotFoundError):
            continue


def _unique(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for d in documents:
        if d.text.strip() and d.text not in seen:
            seen.add(d.text)
            yield d

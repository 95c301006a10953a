"""The texts of the built-in model, read from the user's own interpreter at run time and never copied.

library   the standard library's source without the held-out modules: what the model was trained on
known     the held-out modules: what the model knows without having seen them (forgetting is measured here)
prose     pydoc's topics, English reference prose: the near domain
c         CPython's C headers, where the interpreter has them: the far domain
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOMAINS = ("prose", "c")
SPLITS = ("train", "valid", "test")
PARAGRAPH = 80  # characters from which a paragraph that two documents share makes them one text
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
    """One file or topic: `title` names it the same way on every machine."""

    title: str
    text: str


class TextMissing(RuntimeError):
    """This interpreter does not carry the text that was asked for."""


def library(tests: bool = True) -> list[Document]:
    """The training text: every module that is not held out, in order of name; `tests` adds the test packages."""
    held = {title for titles in heldout().values() for title in titles}
    files = (f for f in sorted(_stdlib().rglob("*.py")) if not any(part in _relative(f) for part in SKIPPED))
    return list(_unique(d for d in _read(files) if d.title not in held and (tests or not is_test(d.title))))


def is_test(title: str) -> bool:
    """Whether a library file belongs to a test package."""
    return any(part in ("test", "tests", "idle_test") for part in title.split("/")[:-1])


def heldout() -> dict[str, list[str]]:
    """{"valid": [..], "test": [..]}: the committed list of modules the model never saw."""
    titles: dict[str, list[str]] = {"valid": [], "test": []}
    for line in Path(__file__).with_name("heldout.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            split, title = line.split(maxsplit=1)
            titles[split].append(title)
    return titles


def known(split: str) -> list[Document]:
    """The held-out modules of a split ("valid" or "test") that this interpreter has. Raises TextMissing without any."""
    documents = list(_read(_stdlib() / title for title in heldout()[split]))
    if not documents:
        raise TextMissing(
            f"none of the held-out modules is in {_stdlib()}; is the library installed as source?"
        )
    return documents


def domain(name: str, split: str) -> list[Document]:
    """The documents of "prose" or "c" in "train", "valid" or "test". Raises TextMissing where the interpreter has none."""
    documents = {"prose": _topics, "c": _headers}[name]()
    groups = _related(documents) if name == "prose" else [[d] for d in documents]
    if not documents:
        where = {"prose": "pydoc_data.topics", "c": sysconfig.get_path("include")}[name]
        raise TextMissing(f"this interpreter has no text for {name!r} ({where} is missing or empty)")
    return _split(groups)[split]


def has(name: str) -> bool:
    """Whether this interpreter carries the domain."""
    return bool({"prose": _topics, "c": _headers}[name]())


def describe(documents: list[Document]) -> dict[str, Any]:
    """Number, bytes and SHA-256 of the documents: what a run records, because texts differ between interpreters."""
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
    """Whole groups by the hash of their titles: a tenth of the characters each to test and valid, the rest to train."""
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
    """Documents in groups, such that a paragraph that stands in two of them puts both into one group.

    pydoc shows many sections under several topics, alone and within larger ones: parted, they would leak into the test.
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


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _relative(file: Path) -> str:
    return file.relative_to(_stdlib()).as_posix()


def _read(files: Iterable[Path], root: Path | None = None) -> Iterator[Document]:
    """Files that are valid UTF-8; the few test files in other encodings are left out."""
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

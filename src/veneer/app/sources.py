"""The texts that a run names, as rows: files of the user, or texts that every Python interpreter carries."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from veneer import embedded
from veneer.data.text import Row, read
from veneer.embedded import texts
from veneer.errors import DataError, suggest

NAMES = (*texts.DOMAINS, "known")


def rows(names: Iterable[str], split: str) -> list[Row]:
    """The rows of all sources. `split` is the part of a built-in text to take where its name does not say one.

    Raises one DataError for all that cannot be read.
    """
    found: list[Row] = []
    problems: list[str] = []
    for name in names:
        try:
            found += _builtin(name, split) if is_builtin(name) else read([Path(name)])
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(problems))
    return found


def is_builtin(name: str) -> bool:
    """Whether a source is one of the interpreter's own texts: builtin:prose, builtin:c:valid, .."""
    return name.startswith(f"{embedded.PREFIX}:")


def _builtin(name: str, split: str) -> list[Row]:
    domain, _, own = name.removeprefix(f"{embedded.PREFIX}:").partition(":")
    part = own or split
    if domain not in NAMES:
        raise DataError(f"{name}: unknown built-in text {domain!r}{suggest(domain, NAMES)}")
    parts = ("valid", "test") if domain == "known" else texts.SPLITS
    if part not in parts:
        raise DataError(f"{name}: the text {domain!r} has no part {part!r}; it has {', '.join(parts)}")
    try:
        documents = texts.known(part) if domain == "known" else texts.domain(domain, part)
    except texts.TextMissing as e:
        raise DataError(f"{name}: {e}") from None
    return [Row("text", {"text": d.text}, f"{name} {d.title}") for d in documents]

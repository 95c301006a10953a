"""Names of the standard library in snake_case, with the CamelCase of each: a task with answers to check."""

from __future__ import annotations

import hashlib
import re

from veneer.embedded.texts import Document, library

NAME = re.compile(r"\b[a-z]{2,}(?:_[a-z]{2,}){1,3}\b")
SHARE = 10  # of a hundred names, for valid and for test text each


def pairs(split: str) -> list[dict[str, str]]:
    """Returns rows of prompt and completion of "train", "valid" or "test"; no name is in two of them."""
    return [row(name) for name in names(library()) if part(name) == split]


def names(documents: list[Document]) -> list[str]:
    """Returns the names of two to four words in the documents, each once, in order."""
    return sorted({name for d in documents for name in NAME.findall(d.text)})


def part(name: str) -> str:
    """Returns the part that a name belongs to, by its hash."""
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "test" if at < SHARE else "valid" if at < 2 * SHARE else "train"


def row(name: str) -> dict[str, str]:
    """Returns the question for the CamelCase of a name, with its answer."""
    return {"prompt": f"{name} ->", "completion": " " + "".join(map(str.capitalize, name.split("_")))}

"""Names of the standard library in snake_case, asked for in CamelCase: a task with answers to check.

names      questions about names of common words, each name in one part alone
passages   beginnings of library modules with their continuations, to rehearse what the built-in model knows
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable

from veneer.embedded.texts import Document, known, library

NAME = re.compile(r"\b[a-z]{2,}(?:_[a-z]{2,}){1,3}\b")
COMMON = 300  # words that asked names are made of: the test asks for new names of learned words
SHARE = 10  # of a hundred names, for valid and for test text each
EVERY, PASSAGE = 8000, 160  # characters of a module for each passage, and characters of a passage


def pairs(split: str) -> list[dict[str, str]]:
    """Returns rows of prompt and completion of "train", "valid" or "test"; no name is in two of them."""
    return [row(name) for name in _asked() if part(name) == split]


@functools.cache
def _asked() -> list[str]:
    return common(names(library(tests=False)))


def names(documents: Iterable[Document]) -> list[str]:
    """Returns the names of two to four words in the documents, each once, in order."""
    return sorted({name for d in documents for name in NAME.findall(d.text)})


def common(every: list[str]) -> list[str]:
    """Returns the names made of the words that stand in most of the names."""
    count = Counter(word for name in every for word in sorted({*name.split("_")}))
    words = {word for word, _ in count.most_common(COMMON)}
    return [name for name in every if words.issuperset(name.split("_"))]


def part(name: str) -> str:
    """Returns the part that a name belongs to, by its hash."""
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "test" if at < SHARE else "valid" if at < 2 * SHARE else "train"


def row(name: str) -> dict[str, str]:
    """Returns the question for the CamelCase of a name, with its answer."""
    camel = "".join(map(str.capitalize, name.split("_")))
    return {"prompt": f'camel_case("{name}") ==', "completion": f' "{camel}"'}


def passages(split: str) -> list[dict[str, str]]:
    """Returns passages as rows of a first line and its continuation: of modules that the built-in model
    learned for "train", of held-out ones for "valid" and "test"."""
    documents = library(tests=False) if split == "train" else known(split)
    found = (passage(d.text, at) for d in documents for at in range(0, len(d.text), EVERY))
    return [row for row in found if row["prompt"].strip() and row["completion"].strip()]


def passage(text: str, at: int) -> dict[str, str]:
    """Returns the passage that begins with the next line after a place in the text."""
    start = text.find("\n", at) + 1 if at else 0
    first, newline, rest = text[start : start + PASSAGE].partition("\n")
    return {"prompt": first, "completion": newline + rest}

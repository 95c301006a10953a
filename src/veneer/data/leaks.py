"""Finds measured rows that are also learned from: equal rows, and rows that share most 13-word n-grams."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from veneer.data.forms.columns import used
from veneer.data.row_files import Row

N = 13  # words in an n-gram: Brown et al. 2020, appendix C, https://arxiv.org/abs/2005.14165
SHARE = 0.5  # of a row's n-grams; from here on the row counts as known
MOST = 20_000_000  # characters of training text whose n-grams are compared; beyond, rows are compared whole


class Leaks(NamedTuple):
    """Names of rows: `equal` ones are training rows too; `alike` ones share half of their n-grams or more."""

    equal: list[str]
    alike: list[str]

    def sentences(self, part: str, shown: Sequence[str]) -> Iterator[str]:
        """Yields a sentence for each kind of leak; shown: how each kind of names is written in it."""
        for names, words, written in zip(self, WORDS, shown, strict=True):
            if names:
                yield f"{part}: {len(names)} rows {words}: {written}"


WORDS = (
    "are learned from too",
    f"share at least half of their learned text, in runs of {N} words, with the training text",
)


def find(train: Sequence[Row], parts: Mapping[str, Sequence[Row]]) -> dict[str, Leaks]:
    """Compares the rows of parts with the training rows.

    Texts of fewer than 13 words are only compared as a whole; so are all if there is too much training text.
    """
    measured = {
        part: [(row, content(row), set(_grams(learned(row)))) for row in rows] for part, rows in parts.items()
    }
    wanted = {gram for rows in measured.values() for _, _, own in rows for gram in own}
    contents: set[str] = set()
    known: set[int] = set()
    seen = 0
    for row in train:
        contents.add(content(row))
        text = learned(row)
        seen += len(text)
        if wanted and seen <= MOST:
            known.update(gram for gram in _grams(text) if gram in wanted)
    found = {part: Leaks([], []) for part in parts}
    for part, rows in measured.items():
        for row, own, grams in rows:
            if own in contents:
                found[part].equal.append(row.where)
            elif grams and len(grams & known) >= SHARE * len(grams):
                found[part].alike.append(row.where)
    return found


def content(row: Row) -> str:
    """Returns the columns that a row's example is made of, as JSON."""
    names = used(row.kind) or sorted(row.columns)  # rows of a task's own kind are compared whole
    return json.dumps({name: row.columns.get(name) for name in names}, sort_keys=True, default=str)


def learned(row: Row) -> str:
    """Returns the text of a row that is usually learned."""
    if row.kind == "messages":
        return "\n".join(m.get("content") or "" for m in row.columns["messages"] if m["role"] == "assistant")
    name = "completion" if row.kind == "pair" else "text"
    return str(row.columns[name]) if name in row.columns else content(row)


def _grams(text: str) -> Iterator[int]:
    words = text.lower().split()
    return (hash(" ".join(words[i : i + N])) for i in range(len(words) - N + 1))

"""Whether what is measured was also learned from: equal rows, and rows that share most of their runs of 13 words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

N = 13  # words in a run, as Brown et al. 2020 (appendix C) compare texts, https://arxiv.org/abs/2005.14165
SHARE = 0.5  # of a row's runs, from which on the row counts as known


class Leaks(NamedTuple):
    """Rows of a part: `equal` are in the training text too; of the others, `alike` share at least half of their runs with it."""

    equal: list[str]
    alike: list[str]


def find(train: Iterable[tuple[bytes, str]], part: Iterable[tuple[str, bytes, str]]) -> Leaks:
    """train: (content, learned text) of each row; part: the same after the row's name. Texts under 13 words are compared whole only."""
    contents: set[bytes] = set()
    runs: set[int] = set()
    for content, text in train:
        contents.add(content)
        runs.update(_runs(text))
    found = Leaks([], [])
    for where, content, text in part:
        own = set(_runs(text))
        if content in contents:
            found.equal.append(where)
        elif own and len(own & runs) >= SHARE * len(own):
            found.alike.append(where)
    return found


def _runs(text: str) -> Iterator[int]:
    words = text.lower().split()
    return (hash(" ".join(words[i : i + N])) for i in range(len(words) - N + 1))

"""Finds measured rows that are also learned from: equal rows, and rows that share most 13-word n-grams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

N = 13  # words in an n-gram: Brown et al. 2020, appendix C, https://arxiv.org/abs/2005.14165
SHARE = 0.5  # of a row's n-grams; from here on the row counts as known


class Leaks(NamedTuple):
    """Names of rows: `equal` ones are training rows too; `alike` ones share half of their n-grams or more."""

    equal: list[str]
    alike: list[str]


def find(train: Iterable[tuple[bytes, str]], part: Iterable[tuple[str, bytes, str]]) -> Leaks:
    """Compares the rows of a part with the training rows.

    train: (content, learned text) of each row; part: (row name, content, learned text).
    Texts of fewer than 13 words are only compared as a whole.
    """
    contents: set[bytes] = set()
    grams: set[int] = set()
    for content, text in train:
        contents.add(content)
        grams.update(_grams(text))
    found = Leaks([], [])
    for where, content, text in part:
        own = set(_grams(text))
        if content in contents:
            found.equal.append(where)
        elif own and len(own & grams) >= SHARE * len(own):
            found.alike.append(where)
    return found


def _grams(text: str) -> Iterator[int]:
    words = text.lower().split()
    return (hash(" ".join(words[i : i + N])) for i in range(len(words) - N + 1))

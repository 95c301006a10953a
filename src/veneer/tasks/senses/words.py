"""Word errors: how many words to change, add or take out until one text is the other."""

from __future__ import annotations

import unicodedata

from veneer.tasks.base.figure import Metric

WER = Metric("wer", "word error rate")


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation; numbers in digits stay digits."""
    kept = (c if unicodedata.category(c)[0] in "LNM" or c == "'" else " " for c in text.casefold())
    return "".join(kept).split()


def word_errors(truth: str, written: str) -> tuple[int, int]:
    """Returns the least number of words to substitute, insert and delete, and the number of true words."""
    wanted, got = words_of(truth), words_of(written)
    above = list(range(len(got) + 1))
    for i, word in enumerate(wanted, 1):
        row = [i]
        for j, other in enumerate(got, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
        above = row
    return above[-1], len(wanted)

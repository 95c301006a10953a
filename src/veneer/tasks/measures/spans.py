"""Spans of classes B-X, I-X and O, and the F1 of whole spans, as in CoNLL-2000's shared task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.tasks.base.figure import Figure
from veneer.tasks.measures.scores import ACCURACY

Pair = tuple[list[int], list[int]]  # the true and the given classes of the words of an example


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Returns (first word, word behind the last, kind) of every span; I- after another kind begins one."""
    found, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        lead, _, own = tag.partition("-")
        if kind and (lead != "I" or own != kind):
            found.add((start, i, kind))
            kind = ""
        if lead in ("B", "I") and not kind:
            start, kind = i, own
    return found


def has_spans(names: Sequence[str]) -> bool:
    """Tells if the classes mark spans."""
    return any(n != "O" for n in names) and all(n == "O" or n[:2] in ("B-", "I-") for n in names)


def f1(pairs: Sequence[Pair], names: Sequence[str]) -> float:
    """Returns the F1 of whole spans, or of classes that mark none the mean F1 over classes; 0 without any."""
    if has_spans(names):
        right = found = there = 0
        for truths, answers in pairs:
            true, given = (spans([names[i] for i in side]) for side in (truths, answers))
            right, found, there = right + len(true & given), found + len(given), there + len(true)
        return 2 * right / (found + there) if found + there else 0.0
    truths, answers = ([i for pair in pairs for i in pair[side]] for side in (0, 1))
    each = [
        2 * sum(a == b == c for a, b in zip(truths, answers, strict=True)) / n
        for c in range(len(names))
        if (n := truths.count(c) + answers.count(c))
    ]
    return sum(each) / len(each) if each else 0.0


def accuracy(pairs: Sequence[Pair]) -> Figure:
    """Returns the share of words with the right class; its parts are the examples'."""
    right = [float(sum(a == b for a, b in zip(*pair, strict=True))) for pair in pairs]
    weights = [float(len(pair[0])) for pair in pairs]
    return Figure.of(ACCURACY, torch.tensor(right).double(), torch.tensor(weights).double())

"""Counts and shows rows of judged answers as tokens: the prompt, and each answer behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.data.pack import IGNORED
from veneer.data.tokens import Tokens
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.preference.answers import Asked


def as_texts(one: Encoded) -> Encoded:
    """Returns the row with a text for each answer: prompt and answer, of which the answer is learned."""
    if not isinstance(one.content, Asked):
        return one
    asked = one.content
    return Encoded(one.row, [_tokens(asked.prompt, a.ids, a.labels) for a in asked.answers], one.whole)


def _tokens(prompt: Tensor, ids: Tensor, labels: Tensor) -> Tokens:
    read = torch.zeros(len(prompt), dtype=torch.bool)
    every = torch.cat([prompt, ids])
    return Tokens(every, torch.cat([read, labels != IGNORED]), torch.zeros_like(every))


def epoch(sequences: Iterable[Sequence[tuple[Tensor, Tensor]]], window: int, per_step: int) -> dict[str, Any]:
    """Returns counts of one pass over the examples. sequences: of each, inputs and labels of its answers."""
    every = list(sequences)
    answers = [pair for some in every for pair in some]
    tokens = sum(len(ids) for ids, _ in answers)
    return {
        "length": window,
        "tokens": tokens,
        "learned": sum(int((labels != IGNORED).sum()) for _, labels in answers),
        "windows": len(answers),
        "filled": tokens / (len(answers) * window) if answers else 0.0,
        "steps": math.ceil(len(every) / per_step),
    }

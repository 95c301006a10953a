"""Asks for the short answers of texts, greedily, and tells which are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from veneer.data.pack import Window
from veneer.data.spread import spread
from veneer.data.tokenizer import Tokenizer
from veneer.tasks.text.answering import asked, questions, same_json, same_text, text_of
from veneer.tasks.text.samples import room

MOST = 32  # questions
TOKENS = 48  # of a short answer
SHARE = 0.5  # of short answers, below which exact answers say little
SHOWN = 240  # characters of a prompt, its end


def is_right(answer: str, truth: str) -> bool:
    """Tells if two answers are equal as text or as JSON."""
    return same_text(answer, truth) or same_json(answer, truth)


def short_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Window],
    *,
    batch: int,
    right: Callable[[str, str], bool] = is_right,
) -> list[dict[str, Any]]:
    """Returns {prompt, truth, answer, right} of evenly spaced questions; none if most answers are long."""
    every = [q for q in questions(examples) if len(q.prompt) > 1]  # no text predicts its first token
    room_left = room(model) - 2 * TOKENS
    short = [q for q in every if len(q.truth) <= TOKENS and len(q.prompt) < room_left]
    if len(short) < max(1.0, SHARE * len(every)):
        return []
    some = spread(short, MOST)
    answers = asked(model, tokenizer, some, batch=batch)
    truths = [text_of(q.truth, tokenizer) for q in some]
    return [
        {"prompt": text_of(q.prompt, tokenizer)[-SHOWN:], "truth": t, "answer": a, "right": right(a, t)}
        for q, t, a in zip(some, truths, answers, strict=True)
    ]

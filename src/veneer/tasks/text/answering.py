"""Asks a language model for the last learned answer of each text, greedily and several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer import foreign
from veneer.adapt.modes import evaluating
from veneer.data.pack import Window
from veneer.data.spread import spread
from veneer.data.tokenizer import Tokenizer
from veneer.tasks.base.task import Between, nothing
from veneer.tasks.text.samples import learned_tokens, room

FURTHER = 16  # tokens that an answer may be longer than the true one: another spelling may be equal too
LEAST = 16  # questions asked at a time
MOST = 32  # questions
SHORT = 48  # of a short answer
SHARE = 0.5  # of short answers, below which exact answers say little
SHOWN = 240  # characters of a prompt, its end


class Question(NamedTuple):
    """A text up to its last learned answer, and that answer, as token ids."""

    prompt: list[int]
    truth: list[int]


def questions(windows: Sequence[Window]) -> list[Question]:
    """Returns a question for every text of the windows that has something before its answer."""
    found = []
    for segment in (s for w in windows for s in w):
        ids, learned = learned_tokens(segment)
        end = len(learned) - learned[::-1].index(True)
        start = next((i + 1 for i in range(end - 1, -1, -1) if not learned[i]), 0)
        if start:
            found.append(Question(ids[:start], ids[start:end]))
    return found


@torch.no_grad()
def asked(
    model: nn.Module,
    tokenizer: Tokenizer,
    every: Sequence[Question],
    *,
    batch: int,
    between: Between = nothing,
    further: int = FURTHER,
    drawing: dict[str, Any] | None = None,
) -> list[str]:
    """Returns the model's answers as text, in order. drawing: options of generate; greedy without."""
    found = [""] * len(every)
    order = sorted(range(len(every)), key=lambda i: len(every[i].prompt))
    with evaluating(model):
        for at in range(0, len(order), max(batch, LEAST)):
            between()
            some = order[at : at + max(batch, LEAST)]
            texts = _written(model, tokenizer, [every[i] for i in some], further, drawing or {})
            for i, text in zip(some, texts, strict=True):
                found[i] = text
    return found


def _written(
    model: Any, tokenizer: Tokenizer, some: Sequence[Question], further: int, drawing: dict[str, Any]
) -> list[str]:
    from transformers import GenerationConfig

    longest = max(len(q.prompt) for q in some)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(q.prompt)) + q.prompt for q in some])
    mask = torch.tensor([[0] * (longest - len(q.prompt)) + [1] * len(q.prompt) for q in some])
    wanted = max(len(q.truth) for q in some) + further
    new = max(1, min(wanted, room(model) - longest))
    ends = sorted({e for q in some for e in _ends(q, tokenizer)})
    own = {"do_sample": False, **drawing}
    config = GenerationConfig(max_new_tokens=new, pad_token_id=pad, eos_token_id=ends or None, **own)
    device = next(model.parameters()).device
    written = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
    return [text_of(row, tokenizer, ends) for row in written[:, longest:].tolist()]


def _ends(question: Question, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's, and a special one that ends the true answer."""
    special, last = set(tokenizer.all_special_ids), question.truth[-1]
    return [
        *([last] if last in special else []),
        *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
    ]


def text_of(ids: Sequence[int], tokenizer: Tokenizer, ends: Sequence[int] = ()) -> str:
    """Returns the ids as text, up to the first of the ends, without special tokens and outer white space."""
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True)).strip()


def same_text(answer: str, truth: str) -> bool:
    """Tells if two answers are equal."""
    return answer == truth


def same_json(answer: str, truth: str) -> bool:
    """Tells if two answers are equal as JSON, whatever the order of keys and white space."""
    try:
        return bool(foreign.loads(answer) == foreign.loads(truth))
    except ValueError:
        return False


MATCHES: dict[str, Callable[[str, str], bool]] = {"exact": same_text, "json": same_json}


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
    room_left = room(model) - 2 * SHORT
    short = [q for q in every if len(q.truth) <= SHORT and len(q.prompt) < room_left]
    if len(short) < max(1.0, SHARE * len(every)):
        return []
    some = spread(short, MOST)
    answers = asked(model, tokenizer, some, batch=batch)
    truths = [text_of(q.truth, tokenizer) for q in some]
    return [
        {"prompt": text_of(q.prompt, tokenizer)[-SHOWN:], "truth": t, "answer": a, "right": right(a, t)}
        for q, t, a in zip(some, truths, answers, strict=True)
    ]

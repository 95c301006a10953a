"""Rows into parts: what is learned and what is only read, and conversations by the tokenizer's template or a plain one.

The plain template, for tokenizers without one of their own (<end> is the tokenizer's end-of-text token):

    ### user
    2 + 2?

    ### assistant
    4<end>

    ### user
    ..
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from veneer.data.text import Row
from veneer.errors import DataError

Messages = Sequence[Mapping[str, str]]


class Part(NamedTuple):
    """A stretch of text; None is the end-of-text token. `special`: names of special tokens in it stand for them."""

    text: str | None
    learned: bool
    special: bool = False


def parts(row: Row, tokenizer: Any, train_on: str) -> list[Part]:
    """The row in order: with train_on="completion" only completions and assistant turns are learned, with "all" everything.

    Raises DataError for a conversation that the tokenizer's template refuses or rewrites as it grows.
    """
    if row.kind == "text":
        found = [Part(row.columns["text"], True), Part(None, True)]
    elif row.kind == "pair":
        found = [Part(row.columns["prompt"], False), Part(row.columns["completion"], True), Part(None, True)]
    elif tokenizer.chat_template:
        found = _templated(row, tokenizer)
    else:
        found = plain(row.columns["messages"])
    return [p._replace(learned=p.learned or train_on == "all") for p in found if p.text != ""]


def plain(messages: Messages, answer: bool = False) -> list[Part]:
    """A conversation in the plain template; `answer` opens another assistant turn."""
    found = []
    for i, message in enumerate(messages):
        gap = "\n\n" if i else ""
        found.append(Part(f"{gap}### {message['role']}\n", False))
        found.append(Part(message["content"], message["role"] == "assistant"))
        if message["role"] == "assistant":
            found.append(Part(None, True))
    if answer:
        found.append(Part("\n\n### assistant\n", False))
    return found


def _templated(row: Row, tokenizer: Any) -> list[Part]:
    messages, found, done = row.columns["messages"], [], ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(row, tokenizer, messages[:i], True)
            after = _render(row, tokenizer, messages[: i + 1], False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    f"{row.where}: the tokenizer's chat template rewrites earlier turns when a conversation goes on, so that turn {i + 1}"
                    f" cannot be marked as what is learned; give one conversation a turn, as prompt and completion"
                )
            found += [Part(before[len(done) :], False, True), Part(after[len(before) :], True, True)]
            done = after
    whole = _render(row, tokenizer, messages, False)
    if whole.startswith(done):
        found.append(Part(whole[len(done) :], False, True))
    ends = tokenizer.eos_token
    if messages[-1]["role"] == "assistant" and not (ends and done.rstrip().endswith(ends)):
        found.append(Part(None, True))
    return found


def _render(row: Row, tokenizer: Any, messages: Messages, answer: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except TemplateError as e:
        raise DataError(f"{row.where}: the tokenizer's chat template refuses this conversation: {e}") from None
    return text


def text_of(found: Iterable[Part]) -> str:
    """The parts' text without end tokens."""
    return "".join(p.text or "" for p in found)

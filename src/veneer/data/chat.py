"""Rows into parts: what is learned and what is only read, and conversations by the tokenizer's template or a plain one.

What the tokenizer's template marks as generated, by {% generation %}, is what is learned of an assistant's turns. Where it
marks nothing, a turn is what the template adds when the conversation grows by it.

The plain template, for tokenizers without one of their own (<end> is the tokenizer's end-of-text token); tools come first
as a turn of their own, and calls after a turn's text, each as JSON on a line:

    ### user
    2 + 2?

    ### assistant
    4<end>

    ### user
    ..
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from veneer.data.row_files import Row
from veneer.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

ASSISTANT = ("assistant",)
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Part(NamedTuple):
    """A stretch of text; None is the end-of-text token. `special`: names of special tokens in it stand for them."""

    text: str | None
    learned: bool
    special: bool = False


def parts(row: Row, tokenizer: Any, train_on: str, roles: Collection[str] = ASSISTANT) -> list[Part]:
    """The row in order: with train_on="completion" completions and the turns of these roles are learned, with "all" everything.

    Raises DataError for a conversation that the tokenizer's template refuses, or rewrites as it grows without marking turns.
    """
    if row.kind == "text":
        found = [Part(row.columns["text"], True), Part(None, True)]
    elif row.kind == "pair":
        found = [Part(row.columns["prompt"], False), Part(row.columns["completion"], True), Part(None, True)]
    elif tokenizer.chat_template:
        found = _templated(row, tokenizer, roles)
    else:
        found = plain(row.columns["messages"], roles=roles, tools=row.columns.get("tools", ()))
    return [p._replace(learned=p.learned or train_on == "all") for p in found if p.text != ""]


def plain(
    messages: Messages, answer: bool = False, *, roles: Collection[str] = ASSISTANT, tools: Sequence[Any] = ()
) -> list[Part]:
    """A conversation in the plain template; `answer` opens another assistant turn."""
    found = [Part("### tools\n" + "\n".join(map(json.dumps, tools)), False)] if tools else []
    for message in messages:
        calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
        gap = "\n\n" if found else ""
        found.append(Part(f"{gap}### {message['role']}\n", False))
        found.append(Part("\n".join([*filter(None, [message["content"]]), *calls]), message["role"] in roles))
        if message["role"] == "assistant":
            found.append(Part(None, "assistant" in roles))
    if answer:
        found.append(Part("\n\n### assistant\n", False))
    return found


def _templated(row: Row, tokenizer: Any, roles: Collection[str]) -> list[Part]:
    messages = row.columns["messages"]
    own = (
        "assistant" in roles
        and MARKER.search(tokenizer.get_chat_template(None, row.columns.get("tools"))) is not None
    )
    spans: list[Span] = []
    if own:
        text, spans = _marked(row, tokenizer)
    done, more = _grown(row, tokenizer, [r for r in roles if not (own and r == "assistant")])
    if not own:
        text = _render(row, tokenizer, messages, False)
    if not text.startswith(done):
        if own:
            raise DataError(_rewrites(row, len(messages)))
        text = done  # what follows the last learned turn is not needed
    found, at = [], 0
    for start, end in sorted([*spans, *more]):
        found += [Part(text[at:start], False, True), Part(text[start:end], True, True)]
        at = end
    found.append(Part(text[at:], False, True))
    ends = tokenizer.eos_token
    if messages[-1]["role"] == "assistant" and not (ends and text.rstrip().endswith(ends)):
        found.append(Part(None, "assistant" in roles))
    return found


def _marked(row: Row, tokenizer: Any) -> tuple[str, list[Span]]:
    """The conversation, and the characters (from, to) that its template marks as generated."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = row.columns.get("tools")
    options = {
        **tokenizer.special_tokens_map,
        "chat_template": tokenizer.get_chat_template(None, tools),
        "tools": tools,
    }
    with _refusals(row):
        (text,), (spans,) = render_jinja_template(
            [row.columns["messages"]], return_assistant_tokens_mask=True, **options
        )
    return text, spans


def _grown(row: Row, tokenizer: Any, roles: Collection[str]) -> tuple[str, list[Span]]:
    """The conversation up to the last turn of these roles, and the characters (from, to) that it grew by at each of them.

    What the template puts before an assistant's turn belongs to the reading: all that it writes to ask for an answer. The turn
    of another role begins with its content.
    """
    messages, spans, done = row.columns["messages"], [], ""
    for i, message in enumerate(messages):
        if message["role"] in roles:
            asks = message["role"] == "assistant"
            before = _render(row, tokenizer, messages[:i], asks) if i or asks else ""
            after = _render(row, tokenizer, messages[: i + 1], False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(_rewrites(row, i + 1))
            start = len(before) if asks else after.find(message["content"].strip(), len(before))
            if start < 0:
                raise DataError(f"{row.where}: the tokenizer's chat template does not show turn {i + 1} as it is; take {message['role']!r}"
                                f" out of train_roles")  # fmt: skip
            spans.append((start, len(after)))
            done = after
    return done, spans


def _rewrites(row: Row, turn: int) -> str:
    return (
        f"{row.where}: the tokenizer's chat template rewrites earlier turns when a conversation goes on, so that turn {turn}"
        f" cannot be marked as what is learned; give one conversation a turn, as prompt and completion"
    )


def _render(row: Row, tokenizer: Any, messages: Messages, answer: bool) -> str:
    with _refusals(row):
        text: str = tokenizer.apply_chat_template(
            messages, tools=row.columns.get("tools"), tokenize=False, add_generation_prompt=answer
        )
    return text


@contextmanager
def _refusals(row: Row) -> Iterator[None]:
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError as e:
        raise DataError(
            f"{row.where}: the tokenizer's chat template refuses this conversation: {e}"
        ) from None


def text_of(found: Iterable[Part]) -> str:
    """The parts' text without end tokens."""
    return "".join(p.text or "" for p in found)

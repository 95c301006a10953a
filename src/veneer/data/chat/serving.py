"""Learns each turn of a conversation in the text that a server would have had before it.

A server renders the messages before a turn, adds the template's request for an answer, and lets the model
write. The turn's example is that prompt, followed by the turn as the template writes it once it stands last.
As long as the prompt of the next turn begins with the example so far, both share one example. Where the
template rewrites earlier turns (it removes their reasoning, or moves the tools), the next turn begins an
example of its own.

Templates that mark generated text, by {% generation %}, decide what is learned of an assistant's turn; else
all that the template writes after the request is learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from veneer.data.chat.rendering import TAGS, Conversation, Span, common, has_call, is_in, split_reasoning
from veneer.errors import DataError, option

REASONING = "reasoning"


class Example(NamedTuple):
    """A text and the characters (from, to) that are learned of it.

    prompt: the number of characters before the last learned turn; end: an end-of-text token that follows,
    True where it is learned, None for none.
    """

    text: str
    spans: list[Span]
    prompt: int
    end: bool | None = None


def examples(talk: Conversation, learned: Sequence[int]) -> list[Example]:
    """Returns at least one example of the turns `learned`. Raises DataError for a turn without an example."""
    if not learned:
        return [whole(talk)._replace(spans=[], end=None)]
    found: list[Example] = []
    if learned[0] == 0 and len(learned) > 1 and not talk.begins(1):
        learned = learned[1:]  # no server could ask for an opening that the template refuses on its own
    for i in learned:
        turn = _answer(talk, i) if talk.messages[i]["role"] == "assistant" else _other(talk, i)
        joined = _joined(talk, found[-1], turn) if found else None
        found = [*found[:-1], joined] if joined else [*found, turn]
    *before, last = found
    text = talk.text(len(talk.messages))
    last = last._replace(text=text) if text.startswith(last.text) else last
    closed = [e if _ends_special(talk, e.text.rstrip()) else e._replace(end=True) for e in before]
    return [*closed, _finished(talk, last, learned[-1] == len(talk.messages) - 1)]


def whole(talk: Conversation) -> Example:
    """Returns the whole conversation as one example, all of it learned."""
    text = talk.text(len(talk.messages))
    return _finished(talk, Example(text, [(0, len(text))], 0), True)


def _finished(talk: Conversation, one: Example, learned: bool) -> Example:
    """Adds an end-of-text token to a conversation that ends with an answer but without that token."""
    message, text, end = talk.messages[-1], one.text.rstrip(), talk.tokenizer.eos_token
    if message["role"] != "assistant" or (end and text.endswith(end)):
        return one
    called = bool(message.get("tool_calls")) and _ends_special(
        talk, text
    )  # a call may end by a token of its own
    return one if called else one._replace(end=learned)


def _answer(talk: Conversation, i: int) -> Example:
    """Returns the example of an assistant's turn."""
    after = talk.text(i + 1)
    prompt, start = _request(talk, i, after)
    written, message = after[start:], talk.messages[i]
    if lost := _lost(message, written):
        reasoned = _reasoned(talk, i, written) if lost == REASONING else None
        if reasoned is None:
            raise DataError(
                f"{_where(talk, i)}: the chat template does not write its {lost};"
                f" remove it, or choose another template by {option('chat_template')}"
            )
        prompt, written = reasoned
    shift = len(prompt)
    spans = [(0, len(written))]
    if talk.is_marked and not lost:
        marks = talk.marked(i + 1)[1]
        spans = [(max(a - start, -shift), b - start) for a, b in marks if b > start]
    return Example(prompt + written, [(a + shift, b + shift) for a, b in spans], shift)


def _request(talk: Conversation, i: int, after: str) -> tuple[str, int]:
    """Returns the prompt that asks for turn i, and where the answer begins in `after`, its rendering."""
    before, prompt = talk.asked(i)
    if prompt and after.startswith(prompt):
        return prompt, len(prompt)
    header = prompt[common(before, prompt, talk.specials) :] if prompt else talk.header
    least = len(before) if after.startswith(before) else 0
    for head in _heads(talk, header):
        start = after.rfind(head) + len(head)
        if head in after and start >= least:
            known = bool(i and prompt)
            return (prompt[: len(prompt) - len(header) + len(head)] if known else after[:start]), start
    raise DataError(
        f"{_where(talk, i)}: the chat template rewrites earlier turns, and nothing shows where this turn"
        f" begins; mark it in the template with {{% generation %}}, or give it a row of its own"
    )


def _heads(talk: Conversation, header: str) -> Iterator[str]:
    """Yields the header and its beginnings, the longest first.

    Some templates ask for reasoning that they leave out of the finished turn, which keeps a beginning only.
    """
    patterns = [re.compile(r"\n"), TAGS, *([talk.specials] if talk.specials else [])]
    ends = {len(header), *(m.end() for pattern in patterns for m in pattern.finditer(header))}
    ends |= {m.start() for m in TAGS.finditer(header)}
    yield from (header[:end] for end in sorted(ends, reverse=True) if end)


def _lost(message: Mapping[str, Any], written: str) -> str:
    """Returns the name of a part of the turn that its rendering lacks, or an empty string."""
    thought, answer = split_reasoning(message)
    if answer and not is_in(answer, written):
        return "content"
    for call in message.get("tool_calls") or ():
        if not has_call(call, written):
            return f"call of {call['function']['name']!r}"
    return REASONING if thought and not is_in(thought, written) else ""


def _reasoned(talk: Conversation, i: int, written: str) -> tuple[str, str] | None:
    """Returns prompt and answer with reasoning that the template asks for but does not write.

    None if the template does not ask for reasoning.
    """
    prompt = talk.asked(i)[1]
    if not prompt.rstrip().endswith("<think>"):
        return None
    thought = split_reasoning(talk.messages[i])[0].strip("\n")
    return prompt, f"{thought}\n</think>\n\n{written.lstrip()}"


def _other(talk: Conversation, i: int) -> Example:
    """Returns the example of a turn that no request precedes: it begins with its content."""
    after = talk.text(i + 1)
    before = talk.asked(i)[0] if i else ""
    content = split_reasoning(talk.messages[i])[1].strip()
    start = after.find(content, common(before, after, talk.specials))
    if start < 0:
        role = talk.messages[i]["role"]
        raise DataError(
            f"{_where(talk, i)}: the chat template does not write its content unchanged;"
            f" take {role!r} out of train_roles"
        )
    return Example(after, [(start, len(after))], start)


def _joined(talk: Conversation, one: Example, turn: Example) -> Example | None:
    """Returns both as one example if the turn's prompt begins with the example; None otherwise.

    Only what follows the last answer's own end may differ: white space, or the end-of-text token.
    """
    same = common(one.text, turn.text[: turn.prompt], talk.specials)
    last = one.spans[-1][1] if one.spans else 0
    if same < last:
        rest = one.text[same:last].strip()
        if rest and not (rest == talk.tokenizer.eos_token and _ends_special(talk, one.text[:same].rstrip())):
            return None
    spans = [(a, min(b, same)) for a, b in one.spans if a < same]
    return turn._replace(spans=[*spans, *turn.spans])


def _ends_special(talk: Conversation, text: str) -> bool:
    return talk.specials is not None and any(m.end() == len(text) for m in talk.specials.finditer(text))


def _where(talk: Conversation, i: int) -> str:
    return f"{talk.row.where}: turn {i + 1}"

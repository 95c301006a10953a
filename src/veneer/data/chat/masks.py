"""Splits rows into parts: stretches of text, each learned or only read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from veneer.data.chat import serving, turns
from veneer.data.chat.plain import plain
from veneer.data.chat.rendering import Conversation
from veneer.data.row_files import Row
from veneer.data.tokenizer import Tokenizer

ASSISTANT = ("assistant",)


class Part(NamedTuple):
    """A stretch of text; None is the end-of-text token.

    special: names of special tokens stand for them; rendered: by a chat template, which writes the beginning
    too.
    """

    text: str | None
    learned: bool
    special: bool = False
    rendered: bool = False


def examples(
    row: Row,
    tokenizer: Tokenizer,
    train_on: str = "completion",
    roles: Collection[str] = ASSISTANT,
    *,
    which: Literal["all", "last"] = "all",
    special: bool = True,
) -> list[list[Part]]:
    """Returns the row as examples, each a list of parts in order.

    train_on="all" learns all text; "completion" learns completions, and the turns of `roles` in
    conversations. A conversation becomes several examples where its template rewrites earlier turns, see
    `serving`. which="last" learns the last such turn only. special: names of special tokens in texts and
    pairs stand for these. Raises DataError for a conversation without such a form.
    """
    everything = train_on == "all"
    if row.kind == "text":
        found = [[Part(row.columns["text"], True, special), Part(None, True)]]
    elif row.kind == "pair":
        asked, answer = row.columns["prompt"], row.columns["completion"]
        found = [[Part(asked, False, special), Part(answer, True, special), Part(None, True)]]
    else:
        found = _conversation(row, tokenizer, turns.chosen(row.columns["messages"], roles, which), everything)
    return [[p._replace(learned=p.learned or everything) for p in one if p.text != ""] for one in found]


def parts(
    row: Row, tokenizer: Tokenizer, train_on: str = "completion", roles: Collection[str] = ASSISTANT
) -> list[Part]:
    """Returns the parts of a row's only example. Raises ValueError if the row has several."""
    (only,) = examples(row, tokenizer, train_on, roles)
    return only


def _conversation(row: Row, tokenizer: Tokenizer, learned: list[int], everything: bool) -> list[list[Part]]:
    messages, tools = row.columns["messages"], row.columns.get("tools", ())
    if not tokenizer.chat_template:
        return [[Part(*stretch) for stretch in plain(messages, learned=learned, tools=tools)]]
    talk = Conversation(row, tokenizer)
    found = [serving.whole(talk)] if everything else serving.examples(talk, learned)
    return [_cut(one) for one in found]


def _cut(one: serving.Example) -> list[Part]:
    found, at = [], 0
    for start, end in one.spans:
        found += [Part(one.text[at:start], False, True, True), Part(one.text[start:end], True, True, True)]
        at = end
    found.append(Part(one.text[at:], False, True, True))
    return found if one.end is None else [*found, Part(None, one.end)]

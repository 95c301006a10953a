"""Reads rows of preferences in the columns of TRL, LLaMA-Factory and axolotl.

A prompt is text, a list of messages, or the beginning that both answers share. Texts are joined as they
stand; messages, and the columns instruction, question and input, are rendered by the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.data.forms import columns as forms
from veneer.data.forms import messages
from veneer.data.row_files import Row
from veneer.errors import DataError

PROMPTS = ("prompt", "conversations", "messages", "instruction", "question", "input")
PAIRED = ("chosen", "rejected")
RESPONSES = ("chosen_response", "rejected_response")
PAIRS = {
    **{f"{name}-pairs": (name, *PAIRED) for name in PROMPTS},
    "instruction-responses": ("instruction", *RESPONSES),
    "pairs": PAIRED,
}
JUDGED: dict[str, tuple[str, ...]] = {
    f"{name}-judged": (name, "completion", "label") for name in ("prompt", "instruction", "question")
}
JUDGED |= {
    "instruction-output-judged": ("instruction", "output", "label"),
    "conversations-judged": ("conversations", "label"),
    "messages-judged": ("messages", "label"),
}
TEXT = {"text": ("text",)}
ASSISTANT = "assistant"

Messages = list[dict[str, Any]]
NO_PROMPT = "'chosen' and 'rejected' share no prompt; begin both with it, or add a column prompt"


def answered(row: Row, *names: str) -> list[Row]:
    """Returns the row once for each answer, as a pair of texts or as messages. Raises DataError."""
    try:
        before = _prompt(row)
        answers = [_answer(row, name) for name in names]
        before, answers = _parted(before, answers)
        return [_joined(row, before, answer) for answer in answers]
    except DataError as e:
        raise DataError(f"{row.where}: {e.text}") from None


def judged(row: Row) -> Row:
    """Returns the only answer of a row with a label, as a pair of texts or as messages. Raises DataError."""
    name = next((n for n in ("completion", "output") if n in row.columns), None)
    if name is not None:
        return answered(row, name)[0]
    try:
        talk = _prompt(row)
        if not isinstance(talk, list) or not talk or talk[-1]["role"] != ASSISTANT:
            raise DataError("the conversation must end with an answer")
        return _joined(row, talk[:-1], talk[-1:])
    except DataError as e:
        raise DataError(f"{row.where}: {e.text}") from None


def is_empty(row: Row) -> bool:
    """Tells if the answer of a row of `answered` has nothing in it."""
    if row.kind == "pair":
        return not row.columns["completion"].strip()
    last = row.columns["messages"][-1]
    return not (str(last.get("content") or "").strip() or last.get("tool_calls"))


def _prompt(row: Row) -> str | Messages | None:
    """Returns the prompt as text or messages; None if the answers begin with it."""
    columns = row.columns
    name = row.kind.partition("-")[0]
    if name == "pairs":
        return None
    if name in ("conversations", "messages"):
        return [*messages.system(columns), *messages.conversation(name, columns)]
    if name == "prompt" and messages.is_listed(columns["prompt"]):
        return messages.conversation("prompt", columns)
    if not isinstance(columns[name], str):
        raise DataError(f"{name!r} must be text, got {messages.shown(columns[name])}")
    if name == "prompt" and not columns.get("system"):
        return str(columns["prompt"])
    if name == "instruction":
        given = {k: v for k, v in columns.items() if k in ("instruction", "input", "system", "history")}
        found: Messages = forms.example("alpaca", {**given, "output": "."})[1]["messages"]
        return found[:-1]
    return [*messages.system(columns), {"role": "user", "content": columns[name]}]


def _answer(row: Row, name: str) -> str | Messages:
    value = row.columns[name]
    opened = messages.opened(value)
    if isinstance(opened, Mapping) and {"role", "from"} & {*opened}:
        opened = [opened]
        return messages.conversation(name, {name: opened})
    if messages.is_listed(value):
        return messages.conversation(name, row.columns)
    if not isinstance(value, str):
        raise DataError(f"{name!r} must be an answer, got {messages.shown(value)}")
    return value


def _parted(
    before: str | Messages | None, answers: Sequence[str | Messages]
) -> tuple[str | Messages, list[str | Messages]]:
    """Returns the prompt, and the answers without it: all of them texts, or all of them messages."""
    if all(isinstance(a, str) for a in answers) and not isinstance(before, list):
        texts = [str(a) for a in answers]
        return (before, [*texts]) if before is not None else _parted_texts(texts)
    talks = [[{"role": ASSISTANT, "content": a}] if isinstance(a, str) else a for a in answers]
    asked = [{"role": "user", "content": before}] if isinstance(before, str) else before
    if all(talk and talk[0]["role"] != ASSISTANT for talk in talks):
        return _parted_talks(talks)
    if asked is None:
        raise DataError(NO_PROMPT)
    return asked, [*talks]


def _parted_texts(texts: Sequence[str]) -> tuple[str, list[str | Messages]]:
    """Cuts off the beginning that texts share, but for a space at its end, as TRL does."""
    shortest = min(map(len, texts))
    n = next((i for i in range(shortest) if len({text[i] for text in texts}) > 1), shortest)
    n -= n > 0 and texts[0][n - 1] == " "
    if not n:
        raise DataError(NO_PROMPT)
    return texts[0][:n], [text[n:] for text in texts]


def _parted_talks(talks: Sequence[Messages]) -> tuple[Messages, list[str | Messages]]:
    """Cuts off the messages that conversations share. Raises DataError if they part at a question."""
    shortest = min(map(len, talks))
    n = next((i for i in range(shortest) if any(t[i] != talks[0][i] for t in talks)), shortest)
    n = min(n, shortest - 1)  # equal conversations part at their last answer
    other = next((t[n]["role"] for t in talks if t[n]["role"] != ASSISTANT), None)
    if other is not None:
        raise DataError(
            f"the prompts of 'chosen' and 'rejected' differ: message {n + 1} must be an answer, got a"
            f" message of {other!r}"
        )
    return talks[0][:n], [t[n:] for t in talks]


def _joined(row: Row, before: str | Messages, answer: str | Messages) -> Row:
    if isinstance(before, str):
        own: dict[str, Any] = {"prompt": before, "completion": answer}
        return Row("pair", own, row.where, source=row.source)
    assert isinstance(answer, list)
    if not any(m["role"] == ASSISTANT for m in answer):
        raise DataError("an answer must hold a message of the assistant")
    read = [{**m, "train": False} if m["role"] == ASSISTANT else m for m in before]
    tools = messages.tools(row.columns)
    talk = {"messages": [*read, *answer], **({"tools": tools} if tools else {})}
    return Row("messages", talk, row.where, source=row.source)

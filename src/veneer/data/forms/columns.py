"""Finds the form of rows by their columns, and turns each row into an example.

There are three kinds of example: text, pair (prompt, completion) and messages. A row without anything to
learn is of the kind "empty".

messages       [{role, content[, tool_calls]}], with optional tools
conversations  [{from: system|human|gpt|function_call|observation, value}], with optional system and tools
instruction    with output; optional input, system and history [[question, answer], ..];
               the user's message is instruction, a newline, and input
prompt         with completion: texts, or lists of messages, of which the completion's are learned
text           all of it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from veneer.data.forms import messages, peers
from veneer.data.forms.messages import shown
from veneer.data.forms.shape import AS_IS, Shape
from veneer.errors import DataError, first_few, option, suggest

# The columns that make a form, and the optional ones it uses.
FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "conversation": ("conversation",),
    "alpaca": ("instruction", "output"),
    "pair": ("prompt", "completion"),
    **{name: peer.needed for name, peer in peers.PEERS.items()},
    "text": ("text",),
}
MORE = {
    "messages": ("tools",),
    "conversations": ("system", "tools"),
    "conversation": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "pair": ("tools",),
}
STRUCTURED = ("messages", "conversations", "conversation", "alpaca", "pair")
COLUMNS = [c for names in FORMS.values() for c in names]
EMPTY = "empty"
CHOSEN = (
    f"use {option('task', 'dpo')}, or set {option('columns')} to prompt=..,completion=chosen to learn the"
    " chosen answers alone"
)
OTHER_TASKS = {
    ("chosen", "rejected"): f"preferences; {CHOSEN}",
    ("input_ids",): "token ids; give the text itself",
}
LABELLED = "label"
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def form_of(columns: Mapping[str, Any], shape: Shape = AS_IS) -> str:
    """Returns the form of these columns, a key of FORMS. Raises DataError for none, several, or another"
    " task's."""
    if shape.forms:
        return _own(columns, shape)
    if not shape.is_given:
        _refuse(columns)
    found = [form for form in STRUCTURED if all(n in columns for n in FORMS[form])]
    if len(found) > 1:
        raise DataError(
            f"the columns must be of one kind of example, got {', '.join(found)}; name those to use by"
            f" {option('columns')}"
        )
    found = found or [form for form, names in FORMS.items() if all(n in columns for n in names)]
    if found:
        return found[0]
    half = next((FORMS[form] for form in STRUCTURED if any(n in columns for n in FORMS[form])), None)
    missing = next((n for n in half or () if n not in columns), None)
    if missing:
        raise DataError(_lacks(missing, columns))
    near = next((hint for n in columns if (hint := suggest(n, COLUMNS)).startswith("; did")), "")
    wanted = "text, prompt and completion, messages, conversations, or instruction and output"
    raise DataError(
        f"columns must be {wanted}, got"
        f" {named(columns)}{near or '; name those to use by ' + option('columns')}"
    )


def _own(columns: Mapping[str, Any], shape: Shape) -> str:
    """Returns the form of a task's own; the first whose columns are there. Raises DataError if none is."""
    found = next((form for form, names in shape.forms.items() if all(n in columns for n in names)), None)
    if found is not None:
        return found
    half = next((names for names in shape.forms.values() if any(n in columns for n in names)), None)
    if half is None:
        raise DataError(f"columns must be {shape.wanted}, got {named(columns)}")
    raise DataError(_lacks(next(n for n in half if n not in columns), columns))


def _refuse(columns: Mapping[str, Any]) -> None:
    """Raises DataError for columns of a task that this one is not."""
    for names, kind in OTHER_TASKS.items():
        there = [n for n in names if n in columns]
        if there:
            raise DataError(f"{' and '.join(map(repr, there))} hold {kind}")
    if LABELLED in columns and ("text" in columns or "completion" in columns):
        other = "text" if "text" in columns else "completion"
        raise DataError(
            f"{LABELLED!r} beside {other!r} is of another task (classification or KTO);"
            f" to learn it as text, set {option('columns')} to prompt=text,completion=label, else to"
            f" {other}={other}"
        )


def example(form: str, columns: Mapping[str, Any], shape: Shape = AS_IS) -> tuple[str, dict[str, Any]]:
    """Returns kind (messages, pair, text or empty) and columns of a row of this form; unused ones are
    unchanged.

    The kind of a task's own form is its name. Raises DataError if a column is missing or of a wrong type.
    """
    for name in shape.forms.get(form, ()):
        if name not in columns:
            raise DataError(_lacks(name, columns))
    if form in shape.forms:
        return form, dict(columns)
    for name in FORMS[form]:
        if name not in columns:
            raise DataError(_lacks(name, columns))
    media = next((name for name in MEDIA if columns.get(name)), None)
    if media:
        raise DataError(f"{media!r} is not empty; this task learns from text alone")
    if form in peers.PEERS:
        return peers.example(form, columns)
    if form == "text":
        return _texts(form, ("text",), columns)
    if form == "pair":
        return _pair(columns)
    found = _alpaca(columns) if form == "alpaca" else _conversation(form, columns)
    idle = {name: value for name, value in columns.items() if name not in (*FORMS[form], *MORE[form])}
    tools = messages.tools(columns) if "tools" in MORE[form] else []
    kind = "messages" if _answers(found) else EMPTY
    return kind, {**idle, "messages": found, **({"tools": tools} if tools else {})}


def used(kind: str) -> tuple[str, ...]:
    """Returns the columns that examples of this kind use."""
    return (*FORMS.get(kind, ()), *MORE.get(kind, ()))


def _answers(found: Iterable[Mapping[str, Any]]) -> bool:
    return any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in found)


def _texts(form: str, names: Iterable[str], columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns a row whose columns are texts; empty if the last of them, which is learned, is empty or"
    " null."""
    for name in names:
        if columns[name] is not None and not isinstance(columns[name], str):
            raise DataError(f"{name!r} must be text, got {shown(columns[name])}")
    return (form if columns[name] else EMPTY), {**columns, **{n: columns[n] or "" for n in names}}


def _pair(columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns a prompt with its completion; as lists of messages, they are a conversation."""
    listed = [name for name in FORMS["pair"] if messages.is_listed(columns[name])]
    if not listed:
        return _texts("pair", FORMS["pair"], columns)
    if len(listed) == 1:
        raise DataError(
            f"'prompt' and 'completion' must both be texts or messages, got {listed[0]!r} as messages"
        )
    before = messages.conversation("prompt", columns)
    read = [{**m, "train": False} if m["role"] == "assistant" else m for m in before]
    found = [*read, *messages.conversation("completion", columns)]
    idle = {n: value for n, value in columns.items() if n not in ("prompt", "completion", "tools")}
    tools = messages.tools(columns)
    kind = "messages" if _answers(found[len(read) :]) else EMPTY
    return kind, {**idle, "messages": found, **({"tools": tools} if tools else {})}


def _conversation(form: str, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    if columns[form] is None:
        return []
    found = messages.conversation(form, columns)
    return found if form == "messages" else [*messages.system(columns), *found]


def _alpaca(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = messages.system(columns)
    for i, pair in enumerate(messages.opened(columns.get("history")) or [], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"'history' {i} must be a question and an answer, got {shown(pair)}")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    for name in ("instruction", "input", "output"):
        if columns.get(name) is not None and not isinstance(columns[name], str):
            raise DataError(f"{name!r} must be text, got {shown(columns[name])}")
    given = columns.get("input")
    asked = f"{columns['instruction']}\n{given}" if given else columns["instruction"] or ""
    if not columns["output"]:
        return []  # earlier answers of the history alone are not what the row is for
    return [*found, {"role": "user", "content": asked}, {"role": "assistant", "content": columns["output"]}]


def named(columns: Iterable[str]) -> str:
    """Returns the names of a row's columns for a message."""
    return first_few((repr(c) for c in columns), 8) or "no columns"


def _lacks(name: str, columns: Mapping[str, Any]) -> str:
    near = suggest(name, columns) if columns else ""
    return f"column {name!r} is missing, got {named(columns)}{near if near.startswith('; did') else ''}"

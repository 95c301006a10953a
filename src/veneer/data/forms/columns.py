"""Turns columns into examples of three kinds: text, pair (prompt, completion) and messages.

messages       [{role, content[, tool_calls]}], with tools beside it
conversations  [{from: system|human|gpt|function_call|observation, value}], with system and tools beside it
instruction    with output; optional input, system and history [[question, answer], ..];
               the user's message is instruction, a newline, and input
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from veneer.data.forms.flags import FLAGS, check_flags
from veneer.errors import DataError, first_few, suggest

# The columns that make a form, and the optional ones it uses.
FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "pair": ("prompt", "completion"),
    "text": ("text",),
}
MORE = {
    "messages": ("tools",),
    "conversations": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
}
SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
COLUMNS = [c for names in FORMS.values() for c in names]


def form_of(columns: Mapping[str, Any]) -> str:
    """Returns the form of these columns, a key of FORMS. Raises DataError for none or several."""
    found = [form for form, names in FORMS.items() if all(n in columns for n in names)]
    if len(found) > 1:
        raise DataError(
            f"the columns must be of one kind of example, got {', '.join(found)}; keep those of one"
        )
    if found:
        return found[0]
    half = next((names for names in FORMS.values() if any(n in columns for n in names)), None)
    missing = next((n for n in half or () if n not in columns), None)
    if missing:
        raise DataError(_lacks(missing, columns))
    near = next((hint for n in columns if (hint := suggest(n, COLUMNS)).startswith("; did")), "")
    wanted = "text, prompt and completion, messages, conversations, or instruction and output"
    raise DataError(f"columns must be {wanted}, got {_named(columns)}{near}")


def example(form: str, columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns kind (messages, pair or text) and columns of a row of this form; unused columns stay unchanged.

    Raises DataError if a column is missing or of a wrong type, or if there is nothing to learn.
    """
    for name in FORMS[form]:
        if name not in columns:
            raise DataError(_lacks(name, columns))
        if form not in ("messages", "conversations") and not isinstance(columns[name], str):
            raise DataError(f"{name!r} must be text, got {json.dumps(columns[name], default=str)[:40]}")
    if form in ("pair", "text"):
        if not columns[FORMS[form][-1]]:
            raise DataError(f"{FORMS[form][-1]!r} is empty: nothing to learn")
        return form, dict(columns)
    messages = {"messages": _own, "conversations": _sharegpt, "alpaca": _alpaca}[form](columns)
    if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
        raise DataError("no assistant message has content: nothing to learn")
    idle = {name: value for name, value in columns.items() if name not in (*FORMS[form], *MORE[form])}
    tools = _opened(columns.get("tools")) if "tools" in MORE[form] else None
    if tools and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise DataError(f"'tools' must be a list of descriptions, got {json.dumps(tools)[:40]}")
    return "messages", {**idle, "messages": messages, **({"tools": tools} if tools else {})}


def used(kind: str) -> tuple[str, ...]:
    """Returns the columns that examples of this kind use."""
    return (*FORMS[kind], *MORE.get(kind, ()))


def _own(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_message(i, m) for i, m in enumerate(_list("messages", columns), 1)]


def _message(i: int, given: Any) -> dict[str, Any]:
    message = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else {}
    if isinstance(parts := message.get("content"), list) and all(
        isinstance(p, dict) and p.get("type") == "text" for p in parts
    ):
        message["content"] = "".join(str(p.get("text", "")) for p in parts)
    calls = _opened(message.pop("tool_calls", None))
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        message = {**message, "tool_calls": [_call(i, c) for c in calls]}
    for name in ("role", "content"):
        optional = name == "content" and calls and name not in message  # absent content stays absent
        if not optional and not isinstance(message.get(name), str):
            raise DataError(f"message {i}: {name!r} must be text")
    try:
        check_flags(message)
    except DataError as e:
        raise DataError(f"message {i}: {e}") from None
    return message


def _call(i: int, given: Any) -> dict[str, Any]:
    """Returns a tool call as chat templates expect it; arguments may be an object or JSON text."""
    function = given.get("function", given) if isinstance(given, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"message {i}: a call in 'tool_calls' lacks a function name")
    arguments = _opened(function.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise DataError(
            f"message {i}: the arguments of {function['name']!r} must be an object,"
            f" got {json.dumps(arguments)[:40]}"
        )
    known = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return {**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _sharegpt(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = [_turn(i, turn) for i, turn in enumerate(_list("conversations", columns), 1)]
    return [*_system(columns), *messages]


def _turn(i: int, turn: Any) -> dict[str, Any]:
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return _message(i, turn)
    for name in ("from", "value"):
        if not isinstance(turn, dict) or not isinstance(turn.get(name), str):
            raise DataError(f"message {i}: {name!r} must be text")
    speaker, value = turn["from"], turn["value"]
    if speaker not in SPEAKERS:
        raise DataError(f"message {i}: unknown 'from' {speaker!r}{suggest(speaker, SPEAKERS)}")
    if speaker == "function_call":
        calls = _opened(value)
        return {
            "role": "assistant",
            "tool_calls": [_call(i, c) for c in (calls if isinstance(calls, list) else [calls])],
        }
    flags = {name: turn[name] for name in FLAGS if name in turn}
    return _message(i, {"role": SPEAKERS[speaker], "content": value, **flags})


def _alpaca(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = _system(columns)
    for i, pair in enumerate(_opened(columns.get("history")) or [], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(
                f"'history' {i} must be a question and an answer, got {json.dumps(pair, default=str)[:40]}"
            )
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    given = columns.get("input") or ""
    if not isinstance(given, str):
        raise DataError(f"'input' must be text, got {json.dumps(given, default=str)[:40]}")
    asked = f"{columns['instruction']}\n{given}" if given else columns["instruction"]
    if not columns["output"]:
        raise DataError("'output' is empty: nothing to learn")
    return [
        *messages,
        {"role": "user", "content": asked},
        {"role": "assistant", "content": columns["output"]},
    ]


def _system(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = columns.get("system") or ""
    if not isinstance(text, str):
        raise DataError(f"'system' must be text, got {json.dumps(text, default=str)[:40]}")
    return [{"role": "system", "content": text}] if text else []


def _list(name: str, columns: Mapping[str, Any]) -> list[Any]:
    found = _opened(columns[name])
    if not isinstance(found, list) or not found:
        raise DataError(f"{name!r} must be a list of at least one message")
    return found


def _opened(value: Any) -> Any:
    """Parses JSON text, which tables hold lists as; returns anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _named(columns: Iterable[str]) -> str:
    return first_few((repr(c) for c in columns), 8) or "no columns"


def _lacks(name: str, columns: Mapping[str, Any]) -> str:
    near = suggest(name, columns) if columns else ""
    return f"column {name!r} is missing, got {_named(columns)}{near if near.startswith('; did') else ''}"

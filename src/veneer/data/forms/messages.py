"""Reads conversations: lists of role and content (OpenAI), of from and value (ShareGPT), or of texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from veneer import foreign
from veneer.data.forms.flags import FLAGS, check_flags
from veneer.data.tables import without_surrogates
from veneer.errors import DataError, suggest

SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant",
    "observation": "tool", "function_response": "tool", "tool": "tool",
}  # fmt: skip
PICTURES = ("image", "image_url", "input_image", "video", "audio", "input_audio")


def conversation(name: str, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages in a column. Raises DataError for anything but a list of messages."""
    found = opened(columns[name])
    if not isinstance(found, list):
        raise DataError(f"{name!r} must be a list of messages, got {shown(found)}")
    if all(isinstance(turn, str) for turn in found):
        found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(found)]
    return [_turn(i, turn) for i, turn in enumerate(found, 1)]


def is_listed(value: Any) -> bool:
    """Tells if a value is a list of messages, or JSON text of one."""
    found = opened(value)
    return isinstance(value, list) or (
        isinstance(found, list) and bool(found) and all(isinstance(m, dict) and "role" in m for m in found)
    )


def _turn(i: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or "from" not in turn or "role" in turn:
        return message(i, turn)
    for name in ("from", "value"):
        if not isinstance(turn.get(name), str):
            raise DataError(f"message {i}: {name!r} must be text, got {shown(turn.get(name))}")
    speaker, value = turn["from"], turn["value"]
    if speaker not in SPEAKERS:
        raise DataError(f"message {i}: unknown 'from' {speaker!r}{suggest(speaker, SPEAKERS)}")
    flags = {name: turn[name] for name in FLAGS if name in turn}
    if speaker == "function_call":
        return message(i, {"role": "assistant", "tool_calls": value, **flags})
    return message(i, {"role": SPEAKERS[speaker], "content": value, **flags})


def message(i: int, given: Any) -> dict[str, Any]:
    """Returns message number i as chat templates expect it. Raises DataError for anything else."""
    if not isinstance(given, dict):
        raise DataError(f"message {i} must be an object with role and content, got {shown(given)}")
    found = {k: v for k, v in given.items() if v is not None}
    if isinstance(parts := found.get("content"), list):
        found["content"] = _joined(i, parts)
    calls = opened(found.pop("tool_calls", None))
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        found["tool_calls"] = [_call(i, c) for c in calls]
    for name in ("role", "content"):
        optional = name == "content" and calls and name not in found  # absent content stays absent
        if not optional and not isinstance(found.get(name), str):
            raise DataError(f"message {i}: {name!r} must be text, got {shown(found.get(name))}")
    try:
        check_flags(found)
    except DataError as e:
        raise DataError(f"message {i}: {e.text}") from None
    return found


def _joined(i: int, parts: list[Any]) -> Any:
    """Returns the text of a content that is a list of parts, or the list itself if some are not texts."""
    kinds = [p.get("type") if isinstance(p, dict) else None for p in parts]
    other = next((kind for kind in kinds if kind in PICTURES), None)
    if other:
        raise DataError(f"message {i} holds a part of type {other!r}; this task learns from text alone")
    return "".join(str(p.get("text", "")) for p in parts) if {*kinds} <= {"text"} else parts


def _call(i: int, given: Any) -> dict[str, Any]:
    """Returns a tool call as chat templates expect it; arguments may be an object or JSON text."""
    function = given.get("function", given) if isinstance(given, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"message {i}: a call in 'tool_calls' lacks a function name")
    arguments = opened(function.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise DataError(
            f"message {i}: the arguments of {function['name']!r} must be an object, got {shown(arguments)}"
        )
    known = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return {**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def tools(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the descriptions of tools in the column `tools`, each as {type, function}. Raises DataError."""
    found = opened(columns.get("tools")) or []
    if not (isinstance(found, list) and all(isinstance(t, dict) for t in found)):
        raise DataError(f"'tools' must be a list of descriptions, got {shown(found)}")
    return [t if "function" in t or "name" not in t else {"type": "function", "function": t} for t in found]


def system(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the column `system` as a list of at most one message. Raises DataError if it is not text."""
    text = columns.get("system") or ""
    if not isinstance(text, str):
        raise DataError(f"'system' must be text, got {shown(text)}")
    return [{"role": "system", "content": text}] if text else []


def opened(value: Any) -> Any:
    """Parses JSON text, which tables hold lists as; returns anything else unchanged.

    Half surrogate pairs that the text spells become U+FFFD, as in rows.
    """
    if not isinstance(value, str):
        return value
    try:
        return without_surrogates(foreign.loads(value))
    except json.JSONDecodeError:
        return value


def shown(value: Any) -> str:
    """Returns the beginning of a value as JSON, for a message."""
    return json.dumps(value, default=str)[:40]

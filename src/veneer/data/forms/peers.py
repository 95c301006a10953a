"""Well-known data sets whose columns have names of their own; each row becomes a conversation or a pair."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from veneer.data.forms import messages
from veneer.errors import DataError


class Peer(NamedTuple):
    """ask: the columns of a question, joined by empty lines; answer; more: columns with a system message"
    " or tools."""

    ask: tuple[str, ...]
    answer: str
    system: str | None = None
    is_pair: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.ask[0], self.answer)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.ask, self.answer, *([self.system] if self.system else []))


# In order: a row takes the first whose needed columns it has.
PEERS = {
    "function calls": Peer(("query",), "answers"),  # xLAM: answers is a JSON list of calls, beside tools
    "dolly": Peer(("instruction", "context"), "response", "system"),
    "openorca": Peer(("question",), "response", "system_prompt"),
    "metamath": Peer(("query",), "response"),
    "gsm8k": Peer(("question", "context"), "answer", "system"),
    "math": Peer(("problem",), "solution"),
    "gpt4all": Peer(("prompt",), "response", "system"),
    "flan": Peer(("inputs",), "targets", is_pair=True),
    "input and output": Peer(("input",), "output", is_pair=True),
    "source and target": Peer(("source",), "target", is_pair=True),
}


def example(name: str, columns: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns kind and columns of a row of one of PEERS. Raises DataError for a value that is not text."""
    peer = PEERS[name]
    idle = {n: value for n, value in columns.items() if n not in (*peer.columns, "tools")}
    for column in peer.columns:
        value = columns.get(column)
        if value is not None and not isinstance(value, str) and name != "function calls":
            raise DataError(f"{column!r} must be text, got {json.dumps(value, default=str)[:40]}")
    answer, asked = columns.get(peer.answer), "\n\n".join(filter(None, map(columns.get, peer.ask)))
    if peer.is_pair:
        return ("pair" if answer else "empty"), {**idle, "prompt": asked, "completion": answer}
    system = columns.get(peer.system) if peer.system else None
    talk = [{"role": "system", "content": system}] if system else []
    turn = {"role": "assistant", "content": answer}
    tools = messages.tools(columns)
    if name == "function calls":
        turn = {"role": "assistant", "tool_calls": answer}
    talk += [{"role": "user", "content": asked}]
    if not answer:
        return "empty", {**idle, "messages": talk}
    found = [messages.message(i, m) for i, m in enumerate([*talk, turn], 1)]
    return "messages", {**idle, "messages": found, **({"tools": tools} if tools else {})}

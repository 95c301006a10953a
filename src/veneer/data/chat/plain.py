"""The plain chat template, for tokenizers without a template of their own.

<end> is the tokenizer's end-of-text token. Tools come first, as a turn of their own. Tool calls follow a
turn's text. Both are JSON, one object a line:

    ### user
    2 + 2?

    ### assistant
    4<end>

    ### user
    ..
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Stretch = tuple[str | None, bool]  # text, or None for the end-of-text token; whether it is learned


def plain(
    messages: Sequence[Mapping[str, Any]], *, learned: Collection[int] = (), tools: Sequence[Any] = ()
) -> list[Stretch]:
    """Returns a conversation in the plain template; `learned` are the indices of the turns to learn."""
    found: list[Stretch] = [("### tools\n" + "\n".join(map(json.dumps, tools)), False)] if tools else []
    for i, message in enumerate(messages):
        calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
        gap = "\n\n" if found else ""
        found.append((f"{gap}### {message['role']}\n", False))
        found.append(("\n".join([*filter(None, [message.get("content")]), *calls]), i in learned))
        if message["role"] == "assistant":
            found.append((None, i in learned))
    return found

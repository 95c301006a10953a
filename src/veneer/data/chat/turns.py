"""Chooses the turns of a conversation to learn: by role, by flags of single messages, or the last one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from veneer.data.forms.flags import is_learned


def chosen(
    messages: Sequence[Mapping[str, Any]], roles: Collection[str], which: Literal["all", "last"] = "all"
) -> list[int]:
    """Returns the indices of the turns to learn."""
    found = [i for i, m in enumerate(messages) if m["role"] in roles]
    found = found[-1:] if which == "last" else found
    return [i for i in found if is_learned(messages[i])]

"""Tokens on a terminal: what is learned on green, token borders by shade; between ⟦ and ⟧ where there is no colour."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

LEARNED = ("black on green", "black on bright_green")
READ = ("default", "dim")


def has_colour() -> bool:
    """Whether stdout is a terminal that shows colours and NO_COLOR is not set."""
    console = Console()
    return console.is_terminal and not console.no_color and console.color_system is not None


def text(found: Mapping[str, Any], colour: bool) -> str:
    """What `veneer data show` prints."""
    key = "on green" if colour else "between ⟦ and ⟧"
    lines = [f"the first {found['shown']} of {found['of']} rows; what is learned is {key}"]
    for row in found["rows"]:
        warning = f", longer than length={found['length']}" if row["too_long"] else ""
        lines.append(f"\n{row['where']}: {row['length']} tokens, {row['learned']} learned{warning}")
        lines.append(_coloured(row["tokens"]) if colour else _marked(row["tokens"]))
    return "\n".join([*lines, *(["", *found["notes"]] if found["notes"] else [])])


def _coloured(tokens: list[dict[str, Any]]) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False, highlight=False
    )
    with console.capture() as shown:
        for i, token in enumerate(tokens):
            style = (LEARNED if token["learned"] else READ)[i % 2]
            console.print(
                Text(token["text"].replace("\n", "↵\n"), style=style, tab_size=1), end="", soft_wrap=True
            )
    return shown.get()


def _marked(tokens: list[dict[str, Any]]) -> str:
    out, before = "", False
    for token in [*tokens, {"text": "", "learned": False}]:
        out += ("⟦" if token["learned"] else "⟧") if token["learned"] != before else ""
        out += token["text"]
        before = token["learned"]
    return out

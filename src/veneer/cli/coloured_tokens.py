"""Shows tokens on a terminal: learned ones on green, or between ⟦ and ⟧ without colours."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from veneer.foreign import visible

LEARNED = ("black on green", "black on bright_green")
READ = ("default", "dim")


def has_colour() -> bool:
    """Returns True if stdout is a terminal that shows colours and NO_COLOR is not set."""
    console = Console()
    return console.is_terminal and not console.no_color and console.color_system is not None


def shown(found: Mapping[str, Any]) -> str:
    """Returns the tokens in the form that stdout can show."""
    return text(found, has_colour())


def text(found: Mapping[str, Any], colour: bool) -> str:
    """Returns the rows of `veneer data show`; token borders are shades of the colour."""
    key = "on green" if colour else "between ⟦ and ⟧"
    lines = [f"the first {found['shown']} of {found['of']} rows; learned tokens are {key}"]
    for row in found["rows"]:
        warning = f", longer than --length {found['length']}" if row["too_long"] else ""
        lines.append(f"\n{visible(row['where'])}: {row['length']} tokens, {row['learned']} learned{warning}")
        if row["spelt"]:
            spelt = ", ".join(f"{name} ({n})" for name, n in row["spelt"].items())
            lines.append(f"names of special tokens that are spelt out, not these tokens: {spelt}")
        lines.append(_coloured(row["tokens"]) if colour else visible(_marked(row["tokens"])))
    return "\n".join([*lines, *(["", *map(visible, found["notes"])] if found["notes"] else [])])


def _coloured(tokens: list[dict[str, Any]]) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False, highlight=False
    )
    with console.capture() as shown:
        for i, token in enumerate(tokens):
            style = (LEARNED if token["learned"] else READ)[i % 2]
            seen = visible(token["text"]).replace("\n", "↵\n")
            console.print(Text(seen, style=style, tab_size=1), end="", soft_wrap=True)
    return shown.get()


def _marked(tokens: list[dict[str, Any]]) -> str:
    out, before = "", False
    for token in [*tokens, {"text": "", "learned": False}]:
        out += ("⟦" if token["learned"] else "⟧") if token["learned"] != before else ""
        out += token["text"]
        before = token["learned"]
    return out

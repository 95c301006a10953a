"""Converts docstrings to Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

SPECIAL = re.compile(r"([\\*_<>\[\]$|~])")
LABEL = re.compile(r"^([A-Z][a-z]+): ", re.MULTILINE)  # "Cost: .." at the start of a line
RAISES = re.compile(r"(?<=[.\w])\s+(?=Raises [A-Z])")
ADDRESS = re.compile(r"(https?://[^\s)>]+[^\s)>.,])")


def escaped(text: str) -> str:
    """Returns the text with Markdown's special characters escaped, except in `code` and addresses."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else _plain(part) for i, part in enumerate(parts))


def _plain(text: str) -> str:
    parts = ADDRESS.split(text)
    return "".join(f"<{part}>" if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


def prose(text: str, names: Collection[str] = ()) -> str:
    """Returns the paragraphs of a docstring.

    `Label: ..` at the start of a line, and `name: ..` or `name, name: ..` of the given names at the start of
    a line or sentence, become a list. "Raises .." becomes a paragraph, indented lines become code.
    """
    return "\n\n".join(_paragraph(p, names) for p in text.strip("\n").split("\n\n") if p.strip())


def _paragraph(text: str, names: Collection[str]) -> str:
    if all(line.startswith("    ") for line in text.splitlines()):
        return f"```text\n{text}\n```"
    text, raises = RAISES.split(text, maxsplit=1) if RAISES.search(text) else (text, "")
    one = "|".join(map(re.escape, names))
    named = re.compile(rf"(?:^|(?<=\.\s))(?:{one})(?:, (?:{one}))*: ", re.MULTILINE)
    starts = sorted(
        {m.start() for pattern in (LABEL, *([named] if names else [])) for m in pattern.finditer(text)}
    )
    lead = escaped(" ".join(text[: starts[0] if starts else len(text)].split()))
    listed = "\n".join(
        f"- {_label(' '.join(text[a:b].split()), names)}" for a, b in pairwise([*starts, len(text)])
    )
    return "\n\n".join(part for part in (lead, listed, escaped(" ".join(raises.split()))) if part)


def _label(row: str, names: Collection[str]) -> str:
    label, _, rest = row.partition(": ")
    own = label.split(", ")
    shown = ", ".join(f"`{n}`" for n in own) if set(own) <= set(names) else f"**{label}**"
    return f"{shown}: {escaped(rest)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in row)} |" for row in lines)

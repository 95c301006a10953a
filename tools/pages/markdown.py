"""Docstrings, which are plain text, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

SPECIAL = re.compile(r"([\\*_<>\[\]$|~])")
LABEL = re.compile(r"^([A-Z][a-z]+): ", re.MULTILINE)  # "Cost: .." at the beginning of a line
ADDRESS = re.compile(r"(https?://[^\s)>]+[^\s)>.,])")


def escaped(text: str) -> str:
    """The text with nothing in it that Markdown would take for itself; `code` and addresses stay."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else _plain(part) for i, part in enumerate(parts))


def _plain(text: str) -> str:
    parts = ADDRESS.split(text)
    return "".join(f"<{part}>" if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


def prose(text: str, names: Collection[str] = ()) -> str:
    """The paragraphs of a docstring. Lines `Label: ..`, and `name: ..` for the given names, become a list; indented ones, code."""
    return "\n\n".join(_paragraph(p, names) for p in text.strip("\n").split("\n\n") if p.strip())


def _paragraph(text: str, names: Collection[str]) -> str:
    if all(line.startswith("    ") for line in text.splitlines()):
        return f"```text\n{text}\n```"
    starts = [m.start() for m in re.finditer(rf"^(?:{'|'.join(map(re.escape, names))}): ", text, re.MULTILINE)] if names else []
    starts += [m.start() for m in LABEL.finditer(text)]
    if not starts:
        return escaped(" ".join(text.split()))
    starts = sorted(set(starts))
    lead = " ".join(text[: starts[0]].split())
    rows = [" ".join(text[a:b].split()) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    listed = "\n".join(f"- {_label(row, names)}" for row in rows)
    return f"{escaped(lead)}\n\n{listed}" if lead else listed


def _label(row: str, names: Collection[str]) -> str:
    name, _, rest = row.partition(": ")
    return f"`{name}`: {escaped(rest)}" if name in names else f"**{name}:** {escaped(rest)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in row)} |" for row in lines)

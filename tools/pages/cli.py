"""Writes the page of the command line: every verb with its examples and flags, read from typer."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.text import Text

from pages.markdown import escaped, table
from veneer.cli.app import command
from veneer.cli.table import VERBS
from veneer.cli.verb import GROUPS, Verb

HEAD = """# Command line

Generated from the commands: `veneer VERB --help` prints the same. Flags take dashes or underscores.
`veneer --install-completion` teaches the shell to complete verbs and flags.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 a check failed, 130 or 143 stopped by a
signal after saving."""


def page() -> str:
    """Returns the whole page, verbs by group."""
    parts = [HEAD]
    for group in GROUPS:
        own = {name: verb for name, verb in VERBS.items() if verb.group == group}
        rows = [(f"[`{name}`](#veneer-{name})", escaped(verb.help)) for name, verb in own.items()]
        parts += [f"**{group}**", table(("verb", "purpose"), rows)]
    parts += [_verb(name, verb) for name, verb in VERBS.items()]
    return "\n\n".join(parts) + "\n"


def _verb(name: str, verb: Verb) -> str:
    parts = [
        f"## veneer {name}",
        escaped(verb.help),
        "```console\n" + "\n".join(f"$ {e}" for e in verb.examples) + "\n```",
    ]
    shown = [p for p in command(name).params if p.name not in ("help", "debug")]
    # Of typer's two kinds of parameters, one has panels.
    for panel, flags in groupby(shown, key=lambda p: getattr(p, "rich_help_panel", None)):
        if panel:
            parts.append(f"**{escaped(panel)}**")
        parts.append(table(("flag", "takes", "meaning"), map(_flag, flags)))
    return "\n\n".join(parts)


def _flag(p: Any) -> tuple[str, str, str]:
    if p.param_type_name == "argument":
        return f"`{p.metavar or p.name.upper()}`", "", _help(p)
    words = ", ".join(f"`{w}`" for w in [*p.opts, *p.secondary_opts])
    return (
        words,
        "" if p.is_flag else f"`{(p.metavar or p.type.name).strip('<>')}`".replace("|", "\\|"),
        _help(p),
    )


def _help(p: Any) -> str:
    return "<br>".join(map(escaped, Text.from_markup(p.help or "").plain.split("\n\n")))

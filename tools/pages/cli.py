"""The page of the command line: every verb with its examples and its real flags, as typer has them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.text import Text

from pages.markdown import escaped, table
from veneer.cli.commands import VERBS, Verb, command

HEAD = """# Command line

Made from the commands themselves: `veneer VERB --help` says the same. Flags may be written with dashes or underscores.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 a check ran and said no, 130 or 143 stopped by a signal, all saved."""


def page() -> str:
    """The whole page."""
    rows = [(f"[`{name}`](#veneer-{name})", escaped(verb.help)) for name, verb in sorted(VERBS.items())]
    return (
        "\n\n".join(
            [
                HEAD,
                table(("verb", "what it does"), rows),
                *(_verb(name, verb) for name, verb in sorted(VERBS.items())),
            ]
        )
        + "\n"
    )


def _verb(name: str, verb: Verb) -> str:
    parts = [
        f"## veneer {name}",
        escaped(verb.help),
        "```console\n" + "\n".join(f"$ {e}" for e in verb.examples) + "\n```",
    ]
    shown = [p for p in command(name).params if p.name not in ("help", "debug")]
    for panel, flags in groupby(
        shown, key=lambda p: getattr(p, "rich_help_panel", None)
    ):  # of typer's two kinds, one has it
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

"""Flags and arguments of verbs that take a Run, beside its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from veneer.cli.panels import METHOD, panel_of

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        exists=True,
        dir_okay=False,
        metavar="<file.yaml>",
        help="Settings from a file; flags replace them.",
        rich_help_panel=panel_of("config"),
    ),
]
Bound = Annotated[
    str | None,
    typer.Option(
        "--forget-at-most",
        metavar="<share>",
        help="Try rates, layers and strengths; keep the best that forgets at most this share, such as 1%.",
        rich_help_panel="Evaluation",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="<name>",
        help="Settings that a study of LoRA recommends: learns-less, without-regret. Flags replace them.",
        rich_help_panel=METHOD,
    ),
]
Configs = Annotated[
    list[Path],
    typer.Argument(
        exists=True,
        dir_okay=False,
        metavar="FILE.yaml...",
        help="One file of settings for each run.",
        show_default=False,
    ),
]
Action = Annotated[
    Literal["show", "check"],
    typer.Argument(help="show: rows as tokens, the learned ones marked; check: counts, lengths, leaks."),
]
Files = Annotated[
    list[str] | None, typer.Argument(metavar="TEXT", help="Texts, as by --data.", show_default=False)
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder or id, or builtin.", show_default=False)
]
Rows = Annotated[int, typer.Option("--rows", metavar="<integer>", help="Rows to show.")]

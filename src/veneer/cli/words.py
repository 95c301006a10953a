"""Holds the settings and flags that all verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

from veneer.cli.panels import OUTPUT


def _dashed(word: str) -> str:
    return word.replace("_", "-")  # --weight_decay as in Python, or --weight-decay


WORDS = {"token_normalize_func": _dashed, "help_option_names": ["-h", "--help"]}


def remember_debug(ctx: typer.Context, value: bool) -> None:
    """Asks the frame to show tracebacks."""
    if value and ctx.obj is not None:
        ctx.obj.debug = True


HELP = "Show an error's traceback (also: VENEER_DEBUG=1)."
Debug = Annotated[bool, typer.Option("--debug", callback=remember_debug, help=HELP, rich_help_panel=OUTPUT)]
DebugAll = Annotated[bool, typer.Option("--debug", callback=remember_debug, help=HELP)]  # before the verb

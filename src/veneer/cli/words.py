"""Words and flags that every verb of the command line shares."""

from __future__ import annotations

from typing import Annotated

import typer


def _dashed(word: str) -> str:
    return word.replace("_", "-")  # --weight_decay as in Python, or --weight-decay


WORDS = {"token_normalize_func": _dashed, "help_option_names": ["-h", "--help"]}


def remember_debug(ctx: typer.Context, value: bool) -> None:
    """Tells the frame that errors are to be shown with where they come from."""
    if value and ctx.obj is not None:
        ctx.obj.debug = True


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=remember_debug, help="Show where an error comes from (also: VENEER_DEBUG=1)."
    ),
]

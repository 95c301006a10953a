"""Holds the settings and flags that all verbs share, and the flags of `veneer fit` alone."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from veneer.cli.panels import METHOD, OUTPUT, SPEED


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
Engine = Annotated[
    Literal["torch", "ray"],
    typer.Option(
        "--engine",
        metavar="<torch|ray>",
        help="Processes. torch: this one, or those of torchrun; ray: workers of Ray Train. [torch]",
        show_default=False,
        rich_help_panel=SPEED,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="<processes>",
        help="Processes of --engine ray, each with a CPU or GPU; one for each GPU unless given.",
        rich_help_panel=SPEED,
    ),
]
Restarts = Annotated[
    int | None,
    typer.Option(
        "--max-restarts",
        metavar="<times>",
        help="Times that --engine ray starts all workers again after one is lost. [2]",
        rich_help_panel=SPEED,
    ),
]

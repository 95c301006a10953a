"""The verbs of the command line. Each imports what it needs when it runs, so that --help need not load PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


def _dashed(word: str) -> str:
    return word.replace("_", "-")  # --weight_decay as in Python, or --weight-decay


WORDS = {"token_normalize_func": _dashed, "help_option_names": ["-h", "--help"]}


def _remember_debug(ctx: typer.Context, value: bool) -> None:
    if value and ctx.obj is not None:
        ctx.obj.debug = True


def _print_version(value: bool) -> None:
    if value:
        from veneer import __version__

        print(f"veneer {__version__}")
        raise typer.Exit


Debug = Annotated[bool, typer.Option("--debug", callback=_remember_debug, help="Show where an error comes from (also: VENEER_DEBUG=1).")]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")]

Config = Annotated[
    Path | None,
    typer.Option("--config", exists=True, dir_okay=False, metavar="<file.yaml>", help="Settings from a file; given flags replace them."),
]


class Verbs(TyperGroup):
    """A group whose verbs with generated flags are made only when one is called; --help lists them by name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, GENERATED[name]() if name in GENERATED else command, rest


app = typer.Typer(cls=Verbs, add_completion=False, pretty_exceptions_enable=False, context_settings=WORDS)


@app.callback(invoke_without_command=True, epilog="veneer VERB --help shows the flags of a verb, with examples.")
def veneer(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    debug: Debug = False,
) -> None:
    """Thin low-rank layers over large models: adapt, train, merge, and see what was learned and forgotten."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)


FIT = "Adapt a model to texts, by full fine-tuning or any method, and measure what was learned and forgotten."
FIT_EXAMPLES = """Examples:

veneer fit --data notes.txt --out runs/notes

veneer fit --model ./llama --data chats.jsonl --method dora --rank 16 --lr 2e-4

veneer fit --config run.yaml --steps 500
"""


@app.command("fit", help=FIT)
def _listed() -> None:
    raise AssertionError("stands in the list of verbs only; _fit() makes what is called")


def _fit() -> Any:
    """The command `fit`, with a flag for every setting of a run and every option of a method."""
    from veneer.cli import flags
    from veneer.train import settings
    from veneer.train.run import Run

    own = flags.of_settings(Run)
    every = [*own, *flags.of_methods({f.name for f in own})]

    def fit(*, config: Config = None, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        file = {} if config is None else settings.read_yaml(config.read_text(encoding="utf-8"), str(config))
        run = Run.from_dict(flags.over(file, flags.values(every, given)))
        from veneer.app.fit import fit as start

        outcome = start(run)
        if as_json:
            print(json.dumps(outcome))

    flags.declare(fit, every)
    return _made("fit", fit, FIT, FIT_EXAMPLES)


def _made(name: str, function: Callable[..., Any], help: str, epilog: str) -> Any:
    """A command outside the app's own list."""
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name, help=help, epilog=epilog, context_settings=WORDS)(function)
    return typer.main.get_command(alone)


GENERATED: dict[str | None, Callable[[], Any]] = {"fit": _fit}


@app.command(epilog="Examples:\n\nveneer methods\n\nveneer methods --json")
def methods(as_json: Json = False, debug: Debug = False) -> None:
    """List the methods and their starts, with options and papers."""
    from veneer.cli import listing

    found = listing.every()
    print(json.dumps(found, indent=2) if as_json else listing.text(found))

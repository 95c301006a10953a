"""Finds the verb of a command line. No verb is loaded before it is called; `veneer --help` loads none."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from veneer.cli.panels import OUTPUT
from veneer.cli.table import FIRST, VERBS
from veneer.cli.verb import GROUPS
from veneer.cli.words import WORDS, DebugAll
from veneer.errors import ConfigError
from veneer.launcher import launched

ABOUT = "Thin low-rank layers over large models: adapt, train, merge, and see what was learned and forgotten."

TOGETHER = ("fit",)  # verbs that the processes of a launcher run together


class Verbs(TyperGroup):
    """A group whose verbs are made when they are called; --help lists them from the table."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        if name not in (None, *TOGETHER) and (n := launched().size) > 1:
            raise ConfigError(f"{name} runs in one process, got {n} of a launcher; only fit runs in several")
        return name, None if name is None else command(name), rest


class Call(TyperCommand):
    """A verb that lists --help among the flags of output, not in a panel above all others."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = OUTPUT
        return option


def command(name: str) -> Any:
    """Returns the verb with all its flags."""
    verb = VERBS[name]
    if verb.own:
        module, _, function = verb.home.partition(":")
        call = getattr(importlib.import_module(module), function)()
    else:
        call = importlib.import_module("veneer.cli.calls").of_verb(verb)
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    epilog = "\n\n".join(["Examples:", *verb.examples])
    alone.command(name, cls=Call, help=verb.help, epilog=epilog, context_settings=WORDS)(call)
    return typer.main.get_command(alone)


def _print_version(value: bool) -> None:
    if value:
        from veneer.version import __version__

        print(f"veneer {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]

app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False, context_settings=WORDS, help=ABOUT)


@app.callback(
    invoke_without_command=True, epilog="veneer VERB --help shows the flags of a verb, with examples."
)
def veneer(ctx: typer.Context, version: Version = False, debug: DebugAll = False) -> None:
    if ctx.invoked_subcommand is None:
        print(beginning())
        raise typer.Exit(2)


def beginning() -> str:
    """Returns what `veneer` alone shows: the verbs to begin with, by group."""
    width = max(map(len, FIRST))
    lines = [ABOUT]
    for group in GROUPS:
        names = [name for name in FIRST if VERBS[name].group == group]
        lines += (
            ["", group, *(f"  veneer {name:<{width}}  {VERBS[name].help}" for name in names)] if names else []
        )
    return "\n".join(
        [*lines, "", f"veneer --help lists all {len(VERBS)} verbs, veneer VERB --help a verb's flags."]
    )


def _listed() -> None:
    raise AssertionError("stands in the list of verbs only; command() makes what is called")


def _list(names: Iterable[str]) -> None:
    for name in names:
        app.command(name, help=VERBS[name].help, rich_help_panel=VERBS[name].group)(_listed)


_list(name for group in GROUPS for name, verb in VERBS.items() if verb.group == group)

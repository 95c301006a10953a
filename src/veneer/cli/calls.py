"""Makes calls for typer from functions of the library, and prints their outcomes as text or JSON."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from veneer.cli import flags, given
from veneer.cli.panels import OUTPUT
from veneer.cli.verb import Verb
from veneer.cli.words import Debug
from veneer.foreign import visible

Json = Annotated[
    bool, typer.Option("--json", help="Print the outcome as JSON on stdout.", rich_help_panel=OUTPUT)
]
Call = Callable[..., int | None]


def of_verb(verb: Verb) -> Call:
    """Returns the call of a verb whose row in the table says all: its function's parameters are the flags."""
    name, _, function = verb.home.partition(":")
    module = importlib.import_module(name)
    run = getattr(module, function)
    every = flags.of_function(run)

    def call(*, as_json: Json = False, debug: Debug = False, **values: Any) -> int:
        outcome = run(**given.values(every, values))
        show(outcome, module.text, as_json)
        return module.exit_code(outcome) if verb.checks else 0

    return flags.declare(call, every)


def show(outcome: Any, text: Callable[[Any], str], as_json: bool, *, coloured: bool = False) -> None:
    """Prints an outcome on stdout, for programs or for people.

    coloured: the text has colours, and its control characters are visible already.
    """
    if as_json:
        print(json.dumps(outcome if isinstance(outcome, Mapping | list) else outcome.as_dict(), indent=2))
    else:
        print(text(outcome) if coloured else visible(text(outcome)))

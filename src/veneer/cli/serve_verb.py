"""Makes the call of `veneer serve`, which takes the settings of a server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from veneer.cli import flags, given
from veneer.cli.calls import Call, Json, show
from veneer.cli.words import Debug

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Name or folder of the base; the adapters' own unless given, or the built-in model.",
        show_default=False,
    ),
]


def serve() -> Call:
    """Returns the call of `veneer serve`."""
    from veneer.verbs.serve import Serving, text
    from veneer.verbs.serve import serve as run

    every = flags.of_settings(Serving)

    def call(model: Model = None, *, as_json: Json = False, debug: Debug = False, **values: Any) -> int:
        outcome = run(model, **given.values(every, values))
        if outcome:
            show(outcome, text, as_json)
        return 3 if outcome.get("failed") else 0

    return flags.declare(call, every)

"""Makes the call of `veneer plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from veneer.cli import flags
from veneer.cli.calls import Call, Json, show
from veneer.cli.panels import SPEED
from veneer.cli.run_verbs import Config, Recipe, of_run, run_of
from veneer.cli.words import Debug

Probe = Annotated[
    bool, typer.Option(help="Measure seconds and bytes in five steps, in memory.", rich_help_panel=SPEED)
]
Size = Annotated[
    int | None,
    typer.Option(
        "--world-size",
        metavar="<integer>",
        help="Forecast memory and exchanged bytes of so many processes, from the configuration alone.",
        rich_help_panel=SPEED,
    ),
]


def plan() -> Call:
    """Returns the call of `veneer plan`."""
    from veneer.verbs.plan import processes
    from veneer.verbs.plan.plan import plan as run
    from veneer.verbs.plan.text import text

    every = of_run()

    def call(
        *,
        config: Config = None,
        recipe: Recipe = None,
        probe: Probe = True,
        world_size: Size = None,
        as_json: Json = False,
        debug: Debug = False,
        **values: Any,
    ) -> int:
        settings = run_of(config, every, values, recipe)
        if world_size is not None:
            show(processes.plan_processes(settings, world_size), processes.text, as_json)
            return 0
        found = run(settings, probe=probe)
        show(found, text, as_json)
        return 0 if found.problem is None else 3

    return flags.declare(call, every)

"""What every verb does: each function here imports the verb's library part and returns the function that typer calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from veneer.cli import flags
from veneer.cli.calls import Call, Json, of_run, settings_of, show, shown, summary, told
from veneer.cli.words import Debug

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        exists=True,
        dir_okay=False,
        metavar="<file.yaml>",
        help="Settings from a file; given flags replace them.",
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
Probe = Annotated[bool, typer.Option(help="Take five steps in memory, for seconds and bytes as they are.")]
Action = Annotated[
    Literal["show", "check"],
    typer.Argument(help="show: rows as tokens, with what is learned; check: count and compare."),
]
Files = Annotated[
    list[str] | None, typer.Argument(metavar="TEXT", help="Texts, as by --data.", show_default=False)
]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", help="Which of them; all unless given.", show_default=False),
]
Rows = Annotated[int, typer.Option("--rows", metavar="<integer>", help="Rows to show.")]
# The settings of a Run that decide what is read and learned.
READING = (
    "data model valid test known batch accumulate length packing train_on train_roles seed allow".split()
)


def combine() -> Call:
    from veneer.verbs.combine import combine as run
    from veneer.verbs.combine import text

    return told(run, text)


def convert() -> Call:
    from veneer.verbs.convert import convert as run
    from veneer.verbs.convert import text

    return shown(run, text)


def convert_config() -> Call:
    from veneer.verbs.convert_config import convert_config as run
    from veneer.verbs.convert_config import text

    return shown(run, text)


def data() -> Call:
    from veneer.cli import coloured_tokens
    from veneer.train.run import Run
    from veneer.verbs.data.check import check, text
    from veneer.verbs.data.show import show as rows_of

    every = [f for f in flags.of_settings(Run) if f.name in READING]

    def call(
        action: Action,
        files: Files = None,
        *,
        rows: Rows = 3,
        config: Config = None,
        as_json: Json = False,
        debug: Debug = False,
        **given: Any,
    ) -> int:
        chosen = settings_of(config, every, {**given, "data": [*(given["data"] or []), *(files or [])]})
        if action == "show":
            found = rows_of(Run.from_dict(chosen), rows)
            show(found, lambda: coloured_tokens.text(found, coloured_tokens.has_colour()), as_json)
            return 0
        checked = check(Run.from_dict(chosen))
        show(checked.as_dict(), lambda: text(checked), as_json)
        return 3 if checked.wrong else 0

    return flags.declare(call, every)


def demo() -> Call:
    from veneer.verbs.demo import demo as run
    from veneer.verbs.demo import text

    every = flags.of_function(run, without=["progress"])

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found, lambda: text(found), as_json)

    return flags.declare(call, every)


def doctor() -> Call:
    from veneer.verbs.doctor import doctor as run
    from veneer.verbs.doctor import text

    def call(as_json: Json = False, debug: Debug = False) -> int:
        found = run()
        show(found.as_dict(), lambda: text(found), as_json)
        return 0 if found.healthy else 3

    return call


def eval() -> Call:
    from veneer.verbs.eval.evaluate import evaluate, text

    return shown(evaluate, text, without=["progress"])


def export() -> Call:
    from veneer.verbs.export import export as run
    from veneer.verbs.export import text

    return shown(run, text)


def extract() -> Call:
    from veneer.verbs.combine import extract as run
    from veneer.verbs.combine import text

    return told(run, text)


def fit() -> Call:
    from veneer.runs.fit import fit as start
    from veneer.train.run import Run

    every = of_run()

    def call(*, config: Config = None, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        result = start(Run.from_dict(settings_of(config, every, given)))
        show({"folder": str(result.folder), **result.metrics}, lambda: summary(result), as_json)

    return flags.declare(call, every)


def fit_many() -> Call:
    from veneer.runs.fit_many import fit_many as start
    from veneer.train.run import Run

    every = [f for f in of_run() if f.name != "out"]  # no two runs have one folder: each file names its own

    def call(files: Configs, *, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        results = start([Run.from_dict(settings_of(file, every, given)) for file in files])
        found = [{"folder": str(result.folder), **result.metrics} for result in results]
        show(
            found,
            lambda: "\n\n".join(f"== {result.folder}\n{summary(result)}" for result in results),
            as_json,
        )

    return flags.declare(call, every)


def generate() -> Call:
    from veneer.verbs.generate import generate as run

    every = flags.of_function(run)

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found, lambda: "\n\n".join(f"== {name}\n{text}" for name, text in found.items()), as_json)

    return flags.declare(call, every)


def inspect() -> Call:
    from veneer.verbs.inspect import inspect as run
    from veneer.verbs.inspect import text

    every = flags.of_function(run)

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found.as_dict(), lambda: text(found), as_json)

    return flags.declare(call, every)


def merge() -> Call:
    from veneer.verbs.merge import merge as run

    every = flags.of_function(run)

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> int:
        verdict = run(**flags.values(every, given))
        show(verdict.as_dict(), lambda: str(verdict), as_json)
        return 3 if verdict.lost and not given["force"] else 0

    return flags.declare(call, every)


def plan() -> Call:
    from veneer.train.run import Run
    from veneer.verbs.plan.plan import plan as run
    from veneer.verbs.plan.text import text

    every = of_run()

    def call(
        *,
        config: Config = None,
        probe: Probe = True,
        as_json: Json = False,
        debug: Debug = False,
        **given: Any,
    ) -> int:
        found = run(Run.from_dict(settings_of(config, every, given)), probe=probe)
        show(found.as_dict(), lambda: text(found), as_json)
        return 0 if found.problem is None else 3

    return flags.declare(call, every)


def report() -> Call:
    from veneer.runs.report import report as run

    every = flags.of_function(run, without=["progress"])

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found, lambda: "\n".join([*found["missing"], f"written: {found['report']}"]), as_json)

    return flags.declare(call, every)


def verify() -> Call:
    from veneer.verbs.verify import exit_code, text
    from veneer.verbs.verify import verify as run

    return shown(run, text, exit_code)


def methods() -> Call:
    from veneer.cli import listing

    def call(names: Names = None, *, as_json: Json = False, debug: Debug = False) -> None:
        found = listing.every() if not names else listing.of(names)
        show(found, lambda: listing.text(found), as_json)

    return call

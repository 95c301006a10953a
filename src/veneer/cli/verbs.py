"""What every verb does: each function here imports the verb's library part and returns the function that typer calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from veneer.cli import flags
from veneer.cli.calls import Call, Json, of_run, settings_of, show, shown, summary, told
from veneer.cli.commands import Debug

if TYPE_CHECKING:
    pass

Config = Annotated[
    Path | None,
    typer.Option("--config", exists=True, dir_okay=False, metavar="<file.yaml>", help="Settings from a file; given flags replace them."),
]
Configs = Annotated[
    list[Path],
    typer.Argument(exists=True, dir_okay=False, metavar="FILE.yaml...", help="One file of settings for each run.", show_default=False),
]
Probe = Annotated[bool, typer.Option(help="Take five steps in memory, for seconds and bytes as they are.")]
Action = Annotated[Literal["show", "check"], typer.Argument(help="show: rows as tokens, with what is learned; check: count and compare.")]
Files = Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts, as by --data.", show_default=False)]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Which of them; all unless given.", show_default=False)]
Rows = Annotated[int, typer.Option("--rows", metavar="<integer>", help="Rows to show.")]
# The settings of a Run that decide what is read and learned.
READING = "data model valid test known batch accumulate length packing train_on train_roles seed allow".split()


def combine() -> Call:
    from veneer.app.algebra import combine as run
    from veneer.app.algebra import text

    return told(run, text)


def convert() -> Call:
    from veneer.app.convert import convert as run
    from veneer.app.convert import text

    return shown(run, text)


def convert_config() -> Call:
    from veneer.app.convert_run import convert_config as run
    from veneer.app.convert_run import text

    return shown(run, text)


def data() -> Call:
    from veneer.app.data_check import check, text
    from veneer.app.data_show import show as rows_of
    from veneer.cli import mask
    from veneer.train.run import Run

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
            show(found, lambda: mask.text(found, mask.has_colour()), as_json)
            return 0
        checked = check(Run.from_dict(chosen))
        show(checked.as_dict(), lambda: text(checked), as_json)
        return 3 if checked.wrong else 0

    return flags.declare(call, every)


def demo() -> Call:
    from veneer.app.demo import demo as run
    from veneer.app.demo import text

    every = flags.of_function(run, without=["progress"])

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found, lambda: text(found), as_json)

    return flags.declare(call, every)


def doctor() -> Call:
    from veneer.app.doctor import doctor as run
    from veneer.app.doctor import text

    def call(as_json: Json = False, debug: Debug = False) -> int:
        found = run()
        show(found.as_dict(), lambda: text(found), as_json)
        return 0 if found.healthy else 3

    return call


def eval() -> Call:
    from veneer.app.eval import evaluate, text

    return shown(evaluate, text, without=["progress"])


def export() -> Call:
    from veneer.app.export import export as run
    from veneer.app.export import text

    return shown(run, text)


def extract() -> Call:
    from veneer.app.algebra import extract as run
    from veneer.app.algebra import text

    return told(run, text)


def fit() -> Call:
    from veneer.app.fit import fit as start
    from veneer.train.run import Run

    every = of_run()

    def call(*, config: Config = None, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        result = start(Run.from_dict(settings_of(config, every, given)))
        show({"folder": str(result.folder), **result.metrics}, lambda: summary(result), as_json)

    return flags.declare(call, every)


def fit_many() -> Call:
    from veneer.app.fit_many import fit_many as start
    from veneer.train.run import Run

    every = [f for f in of_run() if f.name != "out"]  # no two runs have one folder: each file names its own

    def call(files: Configs, *, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        results = start([Run.from_dict(settings_of(file, every, given)) for file in files])
        found = [{"folder": str(result.folder), **result.metrics} for result in results]
        show(found, lambda: "\n\n".join(f"== {result.folder}\n{summary(result)}" for result in results), as_json)

    return flags.declare(call, every)


def generate() -> Call:
    from veneer.app.generate import generate as run

    every = flags.of_function(run)

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found, lambda: "\n\n".join(f"== {name}\n{text}" for name, text in found.items()), as_json)

    return flags.declare(call, every)


def inspect() -> Call:
    from veneer.app.inspect import inspect as run
    from veneer.app.inspect import text

    every = flags.of_function(run)

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found.as_dict(), lambda: text(found), as_json)

    return flags.declare(call, every)


def merge() -> Call:
    from veneer.app.merge import merge as run

    every = flags.of_function(run)

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> int:
        verdict = run(**flags.values(every, given))
        show(verdict.as_dict(), lambda: str(verdict), as_json)
        return 3 if verdict.lost and not given["force"] else 0

    return flags.declare(call, every)


def plan() -> Call:
    from veneer.app.plan import plan as run
    from veneer.app.plan_text import text
    from veneer.train.run import Run

    every = of_run()

    def call(*, config: Config = None, probe: Probe = True, as_json: Json = False, debug: Debug = False, **given: Any) -> int:
        found = run(Run.from_dict(settings_of(config, every, given)), probe=probe)
        show(found.as_dict(), lambda: text(found), as_json)
        return 0 if found.problem is None else 3

    return flags.declare(call, every)


def report() -> Call:
    from veneer.app.report import report as run

    every = flags.of_function(run, without=["progress"])

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found, lambda: "\n".join([*found["missing"], f"written: {found['report']}"]), as_json)

    return flags.declare(call, every)


def verify() -> Call:
    from veneer.app.verify import exit_code, text
    from veneer.app.verify import verify as run

    return shown(run, text, exit_code)


def methods() -> Call:
    from veneer.cli import listing

    def call(names: Names = None, *, as_json: Json = False, debug: Debug = False) -> None:
        found = listing.every() if not names else listing.of(names)
        show(found, lambda: listing.text(found), as_json)

    return call

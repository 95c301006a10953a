"""What verbs have in common: functions of the library as calls for typer, their settings, and their outcome as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli import flags
from veneer.cli.words import Debug

if TYPE_CHECKING:
    from veneer.train.folder.result import Change, Result

Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")]
Call = Callable[..., int | None]


def told(run: Callable[..., dict[str, Any]], text: Callable[[dict[str, Any]], str]) -> Call:
    """A verb whose outcome is the dictionary that its function returns."""
    every = flags.of_function(run)

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> None:
        found = run(**flags.values(every, given))
        show(found, lambda: text(found), as_json)

    return flags.declare(call, every)


def shown(
    run: Callable[..., Any],
    text: Callable[[Any], str],
    exit_code: Callable[[Any], int] = lambda found: 0,
    without: Collection[str] = (),
) -> Call:
    """A verb whose outcome is an object with as_dict()."""
    every = flags.of_function(run, without=without)

    def call(*, as_json: Json = False, debug: Debug = False, **given: Any) -> int:
        found = run(**flags.values(every, given))
        show(found.as_dict(), lambda: text(found), as_json)
        return exit_code(found)

    return flags.declare(call, every)


def of_run() -> list[flags.Flag]:
    """The flags of a Run: its settings, and every option of every method and optimiser."""
    from veneer.train.run import Run

    return [*flags.of_settings(Run), *flags.of_methods(), *flags.of_optimisers()]


def settings_of(config: Path | None, every: list[flags.Flag], given: dict[str, Any]) -> dict[str, Any]:
    """A Run's settings from a file and the flags that replace them."""
    from veneer import settings
    from veneer.train.run import Run

    file = {} if config is None else settings.read_yaml(config.read_text(encoding="utf-8"), str(config))
    chosen = flags.over(file, flags.values(every, given))
    flags.check_optimiser(every, given, str(chosen.get("optimiser", Run.optimiser)))
    return chosen


def summary(result: Result) -> str:
    """What a training led to, for people."""
    from veneer.analyse.numbers import started

    lines = [_measured(f"learned ({result.metrics['learned']['text']})", result.learned)]
    if result.forgotten:
        lines.append(_measured("forgotten (known)", result.forgotten))
    if "start" in result.metrics:
        lines.append(started(result.metrics["start"]))
    page = result.folder / "report.html"
    if page.is_file():
        lines.append(f"told in {page}")
    return "\n".join(
        [*lines, f"saved in {result.adapter}", f"next: veneer generate PROMPT --adapter {result.folder}"]
    )


def _measured(what: str, change: Change) -> str:
    share = (change.after - change.before) / change.before
    return f"{what:<18} {change.before:.3f} -> {change.after:.3f} bits per byte ({share:+.1%})"


def show(outcome: Any, text: Callable[[], str], as_json: bool) -> None:
    """A verb's outcome on stdout, for programs or for people."""
    print(json.dumps(outcome, indent=2) if as_json else text())

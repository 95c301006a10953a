"""Makes the calls of verbs that take the settings of a Run, from a file and from flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from veneer import settings
from veneer.cli import flags, given
from veneer.cli.calls import Call, Json, show
from veneer.cli.panels import panel_of
from veneer.cli.words import Bound, Debug, Engine, Recipe, Restarts, Workers
from veneer.errors import ConfigError
from veneer.launcher import launched

if TYPE_CHECKING:
    from veneer.train.folder.result import Change, Result
    from veneer.train.run import Run

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        exists=True,
        dir_okay=False,
        metavar="<file.yaml>",
        help="Settings from a file; flags replace them.",
        rich_help_panel=panel_of("config"),
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
Action = Annotated[
    Literal["show", "check", "prepare"],
    typer.Argument(
        help="show: rows as tokens, the learned ones marked; check: counts, lengths, leaks; prepare: write"
        " token shards into --out, which fit --data reads."
    ),
]
Files = Annotated[
    list[str] | None, typer.Argument(metavar="TEXT", help="Texts, as by --data.", show_default=False)
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder or id, or builtin.", show_default=False)
]
Rows = Annotated[int, typer.Option("--rows", metavar="<integer>", help="Rows to show.")]
Shards = Annotated[
    Path, typer.Option("--out", metavar="<path>", help="Folder of the token shards that prepare writes.")
]
# The settings of a Run that decide how texts are read and learned.
READING = (
    "data model task valid test known batch accumulate length overlong empty packing columns prompt_template"
    " special_tokens train_on train_roles train_turns chat_template add_tokens seed allow".split()
)


def fit() -> Call:
    """Returns the call of `veneer fit`."""
    from veneer.runs.fit import fit as start

    every = of_run()

    def call(
        *,
        config: Config = None,
        recipe: Recipe = None,
        forget_at_most: Bound = None,
        engine: Engine = "torch",
        workers: Workers = None,
        max_restarts: Restarts = None,
        as_json: Json = False,
        debug: Debug = False,
        **values: Any,
    ) -> None:
        own = launched()
        if forget_at_most is not None:
            if own.size > 1:
                raise ConfigError(f"forget_at_most tries runs in one process, got {own.size}; leave it out")
            if engine != "torch":
                raise ConfigError(
                    f"forget_at_most tries runs in one process, got engine {engine!r}; leave it out"
                )
            from veneer.search.budget import within

            limit = given.share("forget_at_most", forget_at_most)
            show(within.fit_within(run_of(config, every, values, recipe), limit), within.text, as_json)
            return
        run = run_of(config, every, values, recipe, pilots=own.size == 1)
        elsewhere: dict[str, Any] = {"engine": engine, "workers": workers, "max_restarts": max_restarts}
        result = start(run, **{k: v for k, v in elsewhere.items() if v not in ("torch", None)})
        if own.first:
            show(_record(result) if as_json else result, summary, as_json)

    return flags.declare(call, every)


def fit_many() -> Call:
    """Returns the call of `veneer fit-many`."""
    from veneer.runs.fit_many import fit_many as start

    every = [f for f in of_run() if f.name != "out"]  # no two runs have one folder: each file names its own

    def call(files: Configs, *, as_json: Json = False, debug: Debug = False, **values: Any) -> None:
        results = start([run_of(file, every, values) for file in files])
        show(list(map(_record, results)) if as_json else results, summaries, as_json)

    return flags.declare(call, every)


def data() -> Call:
    """Returns the call of `veneer data`."""
    from veneer.cli import coloured_tokens
    from veneer.train.run import Run
    from veneer.verbs.data import prepare as shards
    from veneer.verbs.data.check import check, text
    from veneer.verbs.data.show import show as rows_of

    every = [f for f in flags.of_settings(Run) if f.name in READING]

    def call(
        action: Action,
        files: Files = None,
        *,
        rows: Rows = 3,
        out: Shards = Path("shards"),
        config: Config = None,
        as_json: Json = False,
        debug: Debug = False,
        **values: Any,
    ) -> int:
        run = run_of(config, every, {**values, "data": [*(values["data"] or []), *(files or [])]})
        if action == "show":
            show(rows_of(run, rows), coloured_tokens.shown, as_json, coloured=True)
            return 0
        if action == "prepare":
            show(shards.prepare(run, out), shards.text, as_json)
            return 0
        checked = check(run)
        show(checked, text, as_json)
        return 3 if checked.wrong else 0

    return flags.declare(call, every)


def of_run() -> list[flags.Flag]:
    """Returns the flags of a Run: its settings, and every option of every method and optimiser."""
    from veneer.train.run import Run

    return [*flags.of_settings(Run), *flags.of_methods(), *flags.of_optimisers(), *flags.of_tasks()]


def run_of(
    config: Path | None,
    every: list[flags.Flag],
    values: dict[str, Any],
    recipe: str | None = None,
    *,
    pilots: bool = False,
) -> Run:
    """Returns the run of a file's settings and the flags that replace them, with `auto` settled.

    recipe: fills up what neither gives. pilots: a pilot may decide the rank.
    """
    from veneer import settings
    from veneer.search import auto, recipes
    from veneer.search.rank import auto as rank_auto
    from veneer.train.loop.progress import Voice
    from veneer.train.run import Run

    file = {} if config is None else settings.read_yaml(config.read_text(encoding="utf-8"), str(config))
    chosen = given.over(file, given.values(every, values))
    if recipe is not None:
        chosen, reason = recipes.applied(recipe, chosen)
        Voice(launched().first).say(reason)
    if auto.asked(chosen):
        chosen, reason = auto.settled(chosen)
        Voice(launched().first).say(reason)
    given.check_optimiser(every, values, str(chosen.get("optimiser", Run.optimiser)))
    if not pilots or not rank_auto.asked(chosen):
        return Run.from_dict(chosen)
    return rank_auto.ranked(Run.from_dict(rank_auto.without(chosen)), Voice(True))


def _record(result: Result) -> dict[str, Any]:
    return {"folder": str(result.folder), **result.metrics}


def summaries(results: Sequence[Result]) -> str:
    """Returns the outcomes of several trainings, for people."""
    return "\n\n".join(f"== {result.folder}\n{summary(result)}" for result in results)


def summary(result: Result) -> str:
    """Returns the outcome of a training, for people."""
    from veneer.analyse.numbers import started

    lines = [_measured(f"learned ({result.metrics['learned']['text']})", result.learned, result)]
    if result.forgotten:
        lines.append(_measured("forgotten (known)", result.forgotten, result))
    if "start" in result.metrics:
        lines.append(started(result.metrics["start"]))
    page = result.folder / "report.html"
    if page.is_file():
        lines.append(f"report: {page}")
    ending = [f"adapter: {result.adapter}", f"next: veneer generate PROMPT --adapter {result.folder}"]
    return "\n".join([*lines, *ending])


def _measured(name: str, change: Change, result: Result) -> str:
    share = f" ({(change.after - change.before) / change.before:+.1%})" if change.before else ""
    return f"{name:<18} {change.before:.3f} -> {change.after:.3f} {result.metric.words}{share}"


def compress() -> Call:
    """Returns the call of `veneer compress`."""
    from veneer.compress.lowrank.recipe import Recipe
    from veneer.verbs.compress import compress as verb
    from veneer.verbs.compress.options import Options

    own = [f for f in flags.of_settings(Options) if f.name != "progress"]
    keep, *rest = flags.of_settings(Recipe)
    bare = [f._replace(help=f"{settings.table(Recipe)[f.name].help} [the method's own]") for f in rest]
    every = [*own, keep, *bare]

    def call(model: Model, *, as_json: Json = False, debug: Debug = False, **values: Any) -> None:
        show(verb.compress(model, **given.values(every, values)), verb.text, as_json)

    return flags.declare(call, every)

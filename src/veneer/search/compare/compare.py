"""Compares methods on one model, data and task: each at its own best rate, over seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.files import read_json
from veneer.models import machine
from veneer.search.compare import contenders, on_ray, texts
from veneer.search.compare.cost import cost
from veneer.search.compare.judge import Judge
from veneer.search.compare.settings import Comparison
from veneer.search.compare.table import table
from veneer.search.compare.training import CLAIMS, WAIT, Training
from veneer.search.decide.choose import Choice, choose
from veneer.search.decide.trial import Trial
from veneer.settings import Settings
from veneer.train.errors import Busy
from veneer.train.folder import layout, lock
from veneer.train.folder.drift import defaults, differences
from veneer.train.loop.progress import Voice
from veneer.train.parts.change import FULL
from veneer.train.run import Run
from veneer.version import __version__

FREE = ("together", "out", "engine", "workers")  # settings that change no figure


def compare(
    run: Run,
    comparison: Comparison,
    *,
    forecasts: Mapping[str, Mapping[str, float]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Returns the content of results.json, which it writes into comparison.out; goes on with a begun one.

    run: settings that all trials share; its method, rate and folder are the contenders' own. forecasts:
    {label: {"seconds", "memory_bytes"}} of one training, for the cost and the table. Several processes may
    work on one folder; with engine "ray" they are tasks of Ray. Raises the errors of `fit`, and ConfigError
    for a folder of another comparison.
    """
    voice, out = Voice(progress), Path(comparison.out)
    runs, steps, grids = prepared(run, comparison, voice)
    begin(out, run, comparison)
    if (out / layout.RESULTS).is_file():
        voice.say(f"{out} is finished already; its results are returned unchanged")
        return read_json(out / layout.RESULTS)
    times = {label: f["seconds"] for label, f in (forecasts or {}).items() if f.get("seconds")}
    price = cost(comparison, len(runs), steps, times if len(times) == len(runs) else None)
    voice.say(price.sentence())
    if comparison.engine == "ray":
        on_ray.compare_in_tasks(compare, run, comparison, forecasts, voice)
        return read_json(out / layout.RESULTS)
    training = Training(runs, steps, out, voice, comparison.together)
    choices = choose(training, grids, run.seed)
    repeats, shorter = _further(choices, run.seed, comparison)
    trials = [t for some in (*repeats.values(), *shorter.values()) for t in some]
    found = training.advance(trials, 1.0) if trials else {}
    with alone(out, voice):
        if not (out / layout.RESULTS).is_file():
            judge = Judge(
                next((r for label, r in runs.items() if label != FULL), runs[next(iter(runs))]), voice
            )
            made = table(training, choices, repeats, shorter, found, judge)
            for row in made["methods"]:
                row["memory_bytes"] = (forecasts or {}).get(row["label"], {}).get("memory_bytes")
            about = {"steps": steps, "seeds": comparison.seeds, "cost": price._asdict(), "notes": voice.said}
            machine_of = machine.hardware(machine.device(run.device))
            about |= {"versions": machine.versions(), "hardware": machine_of, "veneer": __version__}
            about |= {name: getattr(run, name) for name in ("model", "task", "data", "seed")}
            layout.put(out / layout.RESULTS, {**made, **about})
    return read_json(out / layout.RESULTS)


def prepared(
    run: Run, comparison: Comparison, voice: Voice
) -> tuple[dict[str, Run], int, dict[str, list[float]]]:
    """Returns the run of every contender, the steps of a training, and the rates to try.

    Reads all texts, so that what does not fit is refused before any training. Raises the errors of `fit`.
    """
    out, labels = Path(comparison.out), comparison.methods
    contenders.runs(run, labels)  # cheap refusals first
    shared, steps = texts.shared(run, out, voice)
    runs = contenders.runs(shared, labels)
    return runs, steps, comparison.grids(runs)


def begin(out: Path, run: Run, search: Settings) -> None:
    """Writes config.json, or raises ConfigError if the folder holds another search.

    Settings that came to Veneer after it was written are at their defaults.
    """
    own = {k: v for k, v in asdict(search).items() if k not in FREE}
    config = {"veneer": __version__, "run": {**asdict(run), "out": ""}, "search": own}
    there = [p.name for p in out.iterdir()] if out.is_dir() else []  # before the look for another's config
    if (out / layout.CONFIG).is_file():
        then = read_json(out / layout.CONFIG)
        now = json.loads(json.dumps(config))
        known = {
            "run": defaults(Run),
            "search": {k: v for k, v in defaults(type(search)).items() if k in own},
        }
        pairs = (({**known[part], **then.get(part, {})}, now[part]) for part in known)
        changed = [line for pair in pairs for line in differences(*pair)]
        if changed:
            lines = "\n".join(f"  {line}" for line in changed)
            raise ConfigError(f"out {out} holds another search:\n{lines}\nchoose another folder")
        return
    if any(name != texts.FOLDER and not name.startswith(".") for name in there):
        raise ConfigError(f"out {out} is not empty and holds no search; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    layout.put(out / layout.CONFIG, config)


def _further(
    choices: Mapping[str, Choice], seed: int, comparison: Comparison
) -> tuple[dict[str, list[Trial]], dict[str, list[Trial]]]:
    """Returns the trials over seeds and over lengths, at the chosen rates."""
    repeats, shorter = {}, {}
    for label, choice in choices.items():
        lr = choice.lr
        some = [] if lr is None else [Trial(label, lr, seed + i) for i in range(comparison.seeds)]
        repeats[label] = some
        shorter[label] = [] if lr is None else [Trial(label, lr, seed, d) for d in comparison.durations]
    return repeats, shorter


@contextmanager
def alone(out: Path, voice: Voice) -> Iterator[None]:
    """Within the block no other process makes the table; waits for one that does."""
    folder, waited = out / CLAIMS / "table", False
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with lock.held(folder):
                yield
                return
        except Busy:
            if not waited:
                voice.say("another process makes the table; waiting for it")
            waited = True
            time.sleep(WAIT)

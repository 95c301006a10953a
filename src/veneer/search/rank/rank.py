"""Finds the rank that a task needs, and writes settings that `fit` takes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.files import read_json, replacing
from veneer.search.compare import texts
from veneer.search.compare.compare import alone, begin
from veneer.search.compare.training import Training
from veneer.search.rank import sweep as sweeping
from veneer.search.rank.gradient import by_gradient
from veneer.search.rank.pilot import check, pilot
from veneer.search.rank.settings import RankSearch
from veneer.train.folder import layout
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

SETTINGS = "rank.yaml"


def rank(run: Run, search: RankSearch, *, progress: bool = True) -> dict[str, Any]:
    """Returns results.json of a search for the rank, beside rank.yaml for `fit` in its folder.

    The same call goes on with a search that was stopped. Raises the errors of `fit`.
    """
    check(run)
    voice, out, begun = Voice(progress), Path(search.out), time.monotonic()
    shared, steps = texts.shared(run, out, voice)
    begin(out, run, search)
    with alone(out, voice):
        if (out / layout.RESULTS).is_file():
            voice.say(f"{out} is finished already; its results are returned unchanged")
            return read_json(out / layout.RESULTS)
        if search.form == "pilot":
            found = pilot(_at(shared, run.lr, max(1, round(search.share * steps))), search, voice)
        elif search.form == "gradient":
            found = by_gradient(_at(shared, run.lr, steps), voice)
        else:
            every = sweeping.runs(shared, search)
            training = Training(every, steps, out, voice, search.together)
            found = sweeping.sweep(training, _at(shared, run.lr, steps), search, voice.say)
        whole = {**found, "steps": steps, "seconds_of_all": time.monotonic() - begun, "notes": voice.said}
        made = {**whole, "folder": str(out), **{n: getattr(run, n) for n in ("model", "task", "data")}}
        if found["rank"] is not None:
            _write(out / SETTINGS, run.method, found)
        layout.put(out / layout.RESULTS, made)
    return read_json(out / layout.RESULTS)


def _at(shared: Run, lr: float | None, steps: int) -> Run:
    return replace(shared, lr=lr, steps=steps, epochs=None)


def _write(file: Path, method: str, found: dict[str, Any]) -> None:
    """Writes the settings of the found rank as YAML, which JSON is part of."""
    own = {"method": method, **chosen(found)}
    with replacing(file) as (temporary,):
        temporary.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in own.items()), encoding="utf-8")


def chosen(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a finished search supports: rank, rate, and a pattern where it is better."""
    own: dict[str, Any] = {"options": {"rank": found["rank"]}}
    if found["lr"]:
        own["lr"] = found["lr"]
    uneven = {n: r for n, r in found.get("rank_pattern", {}).items() if r != found["rank"]}
    test = found.get("test", {})
    if not uneven or (test and not _better(test, found["metric"])):
        uneven = {n: most for n, most in found.get("narrow", {}).items() if most < found["rank"]}
    if uneven:
        own["rank_pattern"] = uneven
    return own


def _better(test: Mapping[str, float], metric: Mapping[str, Any]) -> bool:
    """Tells if ranks by energy are better than uniform ones."""
    gain = test["uniform"] - test["by_energy"]
    return gain > 0 if metric["lower_is_better"] else gain < 0

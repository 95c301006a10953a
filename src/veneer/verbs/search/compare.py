"""`veneer compare`: methods at their own best rates, over seeds, on one model, data and task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer import tasks
from veneer.analyse.page import compare_page
from veneer.errors import VeneerError
from veneer.files import read_json
from veneer.search.compare import compare as search
from veneer.search.compare.settings import Comparison
from veneer.tasks.base.abilities import Outlined
from veneer.train.folder import layout
from veneer.train.loop.progress import Voice
from veneer.train.run import Run
from veneer.verbs.plan.plan import plan

FORECAST = "forecast.json"
TINY = 1e-6  # a rate that leaves finite whatever a few steps change


def compare(run: Run, comparison: Comparison, *, probe: bool = True, progress: bool = True) -> dict[str, Any]:
    """Compares methods as `comparison` says, and returns results.json, beside report.html in its folder.

    run: settings that all trials share. probe: measures a few steps of each contender before the start, to
    forecast time and memory. The same call goes on with a comparison that was stopped. Raises the errors of
    `fit`.

        veneer.compare(Run(data="notes.txt", steps=100), Comparison(methods=("full", "lora")))
    """
    out, voice = Path(comparison.out), Voice(progress)
    forecasts = _forecasts(run, comparison, voice) if probe else None
    found = search.compare(run, comparison, forecasts=forecasts, progress=progress)
    for sentence in compare_page.write(out):
        voice.say(sentence)
    return {**found, "folder": str(out)}


def _forecasts(run: Run, comparison: Comparison, voice: Voice) -> dict[str, dict[str, float]] | None:
    """Returns seconds and bytes of one training of each contender, once for each comparison."""
    out = Path(comparison.out)
    if (out / layout.CONFIG).is_file():
        return read_json(out / FORECAST) if (out / FORECAST).is_file() else None
    if not issubclass(tasks.get(run.task), Outlined):
        return None
    runs, _, _ = search.prepared(run, comparison, Voice(False))
    found: dict[str, dict[str, float]] = {}
    with voice.phase("forecasting time and memory"):
        for label, one in runs.items():
            try:
                made = plan(replace(one, lr=TINY), probe=True, progress=False)
            except VeneerError as e:
                voice.say(f"{label}: no forecast: {e}")
                continue
            found[label] = {"memory_bytes": made.memory.growth, "seconds": made.seconds or 0.0}
    search.begin(out, run, comparison)
    layout.put(out / FORECAST, found)
    return found


def text(found: Mapping[str, Any]) -> str:
    """Returns the comparison as a table for people, with the verdicts in words."""
    rows = [compare_page.HEAD, *(compare_page.score_row(row) for row in found["methods"])]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    says = [v["sentence"] for v in found["verdicts"]]
    end = [compare_page.summary(found), f"report: {found['folder']}/report.html"]
    return "\n".join([*lines, "", *(says and [*says, ""]), *end])

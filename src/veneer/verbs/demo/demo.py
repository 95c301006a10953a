"""`veneer demo`: three methods on the built-in model, measured in learning and forgetting; then questions
with answers to check."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.analyse.page import demo_report
from veneer.analyse.page.demo_report import ANSWERS, METRIC
from veneer.analyse.page.plots import TITLES, learning_vs_forgetting
from veneer.analyse.page.run_report import REPORT
from veneer.embedded.texts import DOMAINS, describe, domain, has, known
from veneer.models import machine
from veneer.runs.shared import Shared
from veneer.train.folder.layout import RESULTS, put
from veneer.train.loop.progress import Voice
from veneer.train.run import Run
from veneer.verbs.demo import questions
from veneer.verbs.demo.contenders import CONTENDERS, settings
from veneer.verbs.demo.judge import Judge
from veneer.verbs.demo.table import PICTURE, text
from veneer.verbs.demo.training import trained

__all__ = ["demo", "text"]
NOISE = 0.03  # of the metric: above twice the largest deviation over seeds in bench/results/demo_rates.json


def demo(
    out: str = "runs/demo", *, steps: int = 100, seed: int = 0, fresh: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Trains every method on every text that this interpreter has, then a LoRA on questions; writes
    results.json, pictures and a page into `out`.

    out: folder of the demo; trainings that are finished there are not repeated, one that was stopped goes on
    steps: length of each training on text, 1,024 tokens a step; the questions take 2.5 times as many
    seed: decides starts and order
    fresh: remove what an earlier demo left in `out` and begin anew
    """
    folder, voice = Path(out), Voice(progress)
    targets = [d for d in DOMAINS if has(d)]
    runs = {
        (t, label): settings(folder, t, label, c, steps=steps, seed=seed)
        for t in targets
        for label, c in CONTENDERS.items()
    }
    if fresh:
        _clear(folder)
    for missing in sorted(set(DOMAINS) - set(targets)):
        voice.say(f"text for {TITLES[missing]!r} is missing in this interpreter; the demo leaves it out")
    judge, shared = Judge(seed), Shared()
    rows = _trained(runs, judge, shared, voice)
    asking = questions.settings(folder, steps=steps, seed=seed)
    results = {
        "methods": rows,
        ANSWERS: _asked(asking, judge, shared, voice),
        f"noise_{METRIC.name}": NOISE,
        "steps": steps,
        "seed": seed,
        "texts": {t: {s: describe(domain(t, s)) for s in ("train", "valid", "test")} for t in targets}
        | {"known": describe(known("test"))},
        "versions": machine.versions(),
        "picture": PICTURE,
    }
    put(folder / RESULTS, results)
    learning_vs_forgetting(rows, folder / PICTURE, NOISE, METRIC)
    demo_report.write(folder)
    return results


def _trained(
    runs: Mapping[tuple[str, str], Run], judge: Judge, shared: Shared, voice: Voice
) -> list[dict[str, Any]]:
    """Trains every run, or reads its finished folder, and returns the measured rows."""
    rows: list[dict[str, Any]] = []
    for (target, label), run in runs.items():
        voice.say(f"{TITLES[label]} on {TITLES[target]} ({len(rows) + 1} of {len(runs) + 1})")
        result = trained(run, progress=voice.aloud, shared=shared)
        with voice.phase("measuring strengths"):
            rows.append(judge.row(target, label, result))
    return rows


def _asked(run: Run, judge: Judge, shared: Shared, voice: Voice) -> dict[str, Any]:
    """Trains on questions, or reads the finished folder, and returns the measured answers."""
    voice.say("LoRA on names in CamelCase (the last one)")
    result = trained(run, progress=voice.aloud, shared=shared)
    with voice.phase("asking the test questions at every strength"):
        return questions.row(judge, result)


def _clear(folder: Path) -> None:
    """Removes what a demo makes, and nothing else that may lie there."""
    for target in DOMAINS:
        for label in CONTENDERS:
            shutil.rmtree(folder / f"{target}-{label}", ignore_errors=True)
    shutil.rmtree(folder / questions.NAMES, ignore_errors=True)
    for name in (RESULTS, PICTURE, REPORT):
        (folder / name).unlink(missing_ok=True)

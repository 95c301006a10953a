"""Measures the parts of a report beyond the training's own figures: dial, layers, samples and a preview of
the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from veneer.adapt.attached import changes, n_base_parameters
from veneer.adapt.switch import using
from veneer.analyse.spectra import spectra
from veneer.data.spread import spread
from veneer.errors import VeneerError
from veneer.runs.dial import STRENGTHS, Point, dial, finite, recommend
from veneer.runs.texts.texts import Text, evaluated
from veneer.tasks import Task
from veneer.tasks.base.abilities import Asked, Examined, Previewed, Writer
from veneer.tasks.base.task import Between, nothing
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

EXAMPLES = 6  # of each text, to choose the strength by
EXAMINED = 400  # examples whose answers are looked at one by one
VALUES = 64  # singular values of a matrix that are kept
DENSE = 3e10  # sum of out * in * min(out, in) over dense changes, up to which singular values take some 10 s

Texts = Mapping[str, Text]


def examine(
    model: nn.Module,
    name: str,
    task: Task,
    texts: Texts,
    *,
    run: Run,
    voice: Voice,
    prompts: Sequence[str] = (),
    measured: Mapping[str, Any] | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    between: Between = nothing,
) -> dict[str, Any]:
    """Returns base_parameters, dial, layers, preview, samples and report_seconds of adapter `name` for
    results.json.

    prompts: to continue, in place of beginnings of valid text; measured: results.json of the run, for figures
    of the base and of full strength; precision: context of measurements; between: called often, its errors
    end everything.
    """
    begun = time.monotonic()
    model.eval()
    found: dict[str, Any] = {"base_parameters": n_base_parameters(model)}
    with precision(), voice.phase("measuring strengths"):
        found["dial"] = dialled(model, name, task, texts, run=run, measured=measured or {}, between=between)
    with voice.phase("measuring layers"):
        found["layers"] = layers(model, name, voice)
    if isinstance(task, Previewed):
        found["preview"] = task.preview(texts["train"].examples)
    between()
    if isinstance(task, Asked):
        with precision(), voice.phase("asking for short answers"):
            found |= answered(model, name, task, texts, run=run, voice=voice)
    if isinstance(task, Examined):
        found["examined"] = looked_at(model, name, task, texts, run=run, voice=voice, precision=precision)
    if isinstance(task, Writer):
        rows = [{"prompt": p} for p in prompts] or task.prompts(model, texts["valid"].examples)
        source = "Prompts as given" if prompts else "Prompts from valid text, which was not trained on"
        with voice.phase("sampling"):
            samples = written(model, name, task, rows, seed=run.seed, voice=voice, between=between)
        found["samples"] = samples and {"source": source, **samples}
    return {**found, "report_seconds": time.monotonic() - begun}


def answered(
    model: nn.Module, name: str, task: Asked, texts: Texts, *, run: Run, voice: Voice
) -> dict[str, Any]:
    """Returns {"answers": ..}: short answers to test text, else valid text, of base and adapter.

    Returns nothing if the text asks for no short answers.
    """
    part = "test" if "test" in texts else "valid"
    found = []
    for acting in ([], [name]):
        with using(model, *acting):
            found.append(task.answers(model, texts[part].examples, batch=run.batch))
    rows = [
        {"prompt": b["prompt"], "truth": b["truth"], "before": b["answer"], "after": a["answer"]}
        | {"right": a["right"]}
        for b, a in zip(*found, strict=True)
    ]
    before, after = (sum(row["right"] for row in some) for some in found)
    if not rows:
        return {}
    voice.say(f"right answers on {part} text: {before} of {len(rows)} before, {after} after")
    return {"answers": {"text": part, "asked": len(rows), "before": before, "after": after, "rows": rows}}


def looked_at(
    model: nn.Module,
    name: str,
    task: Examined,
    texts: Texts,
    *,
    run: Run,
    voice: Voice,
    precision: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """Returns the task's look at its answers to test text, else to valid text, with the adapter alone."""
    part = "test" if "test" in texts else "valid"
    examples = spread(texts[part].examples, EXAMINED)
    with using(model, name), precision(), voice.phase("looking at answers"):
        seen = task.examined(model, examples, batch=run.batch)
    return {"text": part, "n": len(examples), **seen}


def sampler(
    model: nn.Module, task: Writer, examples: Sequence[Any], run: Run
) -> Callable[[], list[dict[str, str]]]:
    """Returns a function that continues the run's prompts with the model, as a list of {prompt, text}."""
    prompts = [row["prompt"] for row in task.prompts(model, examples, run.samples)]
    return lambda: [{"prompt": p, "text": task.write(model, p, seed=run.seed)} for p in prompts]


def dialled(
    model: nn.Module,
    name: str,
    task: Task,
    texts: Texts,
    *,
    run: Run,
    measured: Mapping[str, Any],
    between: Between,
) -> dict[str, Any]:
    """Returns the dial on the examples of the run's own figures: of test text, or of valid text without any.

    Its strength is chosen on a few examples of valid text.
    """
    every = evaluated(texts, run, task)
    part, known = "test" if "test" in every else "valid", every.get("known", [])
    few = {"target": spread(every["valid"], EXAMPLES), "known": spread(known, EXAMPLES)}
    choosing = dial(model, name, task, few, batch=run.batch, between=between)
    ends = _ends(measured, part)
    left = [s for s in STRENGTHS if s not in ends]
    text = {"target": every[part], "known": known}
    points = dial(model, name, task, text, strengths=left, batch=run.batch, between=between)
    choosing, points = finite(choosing, sorted([*points, *ends.values()]))
    return {
        "recommended": recommend(choosing, task.METRIC),
        "chosen_on": "valid text",
        "text": f"{part} text",
        "apart": part != "valid",
        "windows": len(every[part]),
        "as_measured": True,  # on the examples of the run's own figures
        "chosen_by": [p.as_dict(task.METRIC) for p in choosing],
        "points": [p.as_dict(task.METRIC) for p in points],
    }


def _ends(measured: Mapping[str, Any], part: str) -> dict[float, Point]:
    """Returns the points of the base and of full strength that the run measured already, by strength."""
    found = {s: measured[key] for s, key in ((0.0, "before"), (1.0, "after")) if key in measured}
    return {s: Point(s, figs[part], figs.get("known")) for s, figs in found.items() if part in figs}


@torch.no_grad()
def layers(model: nn.Module, name: str, voice: Voice) -> list[dict[str, Any]]:
    """Returns the spectrum of every layer's change; none if dense changes would take too long."""
    work = 0.0
    for site, delta in changes(model, name):
        f = delta.factors(site)
        if f is None or not f.is_product:
            work += site.out * site.in_ * min(site.out, site.in_)
    if work > DENSE:
        voice.say(
            "the report leaves out singular values, which would take minutes for dense changes: see veneer"
            " inspect"
        )
        return []
    return [{**s.as_dict(), "values": s.values[:VALUES]} for s in spectra(model, name)]


def written(
    model: nn.Module,
    name: str,
    task: Writer,
    rows: Sequence[Mapping[str, str]],
    *,
    seed: int,
    voice: Voice,
    between: Between,
) -> dict[str, Any] | None:
    """Returns prompts continued by base and adapted model, with the same draws; None if the model cannot
    write."""
    found: list[dict[str, str]] = []
    try:
        for row in rows:
            own = dict(row)
            for key, strengths in (("before", []), ("after", [name])):
                between()
                with using(model, *strengths):
                    own[key] = task.write(model, row["prompt"], seed=seed)
            found.append(own)
    except VeneerError as e:
        voice.say(f"the report has no samples: {e}")
        return None
    return {**task.writing(model), "rows": found}

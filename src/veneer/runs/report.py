"""`veneer report`: writes the page of a run, at its end and again from its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from veneer.adapt.store import store
from veneer.analyse.page import demo_report
from veneer.analyse.page import run_report as page
from veneer.errors import ConfigError, NotWritten, VeneerError
from veneer.files import read_json
from veneer.models import machine
from veneer.runs import base_model, findings
from veneer.runs.learner import precision
from veneer.runs.prepare import NAME, Ready, read
from veneer.train.folder import drift, layout
from veneer.train.loop.progress import Voice
from veneer.train.loop.signals import Stop, Wish
from veneer.train.run import Run


def report(
    run: str, *, measure: bool = False, prompt: Sequence[str] = (), progress: bool = True
) -> dict[str, Any]:
    """Writes report.html into the folder of a finished run or demo; returns the page's path and what it
    lacks.

    run: folder of the run
    measure: measure dial, layers and samples again, which reads the model and the texts
    prompt: prompts to continue, in place of beginnings of valid text; measures again; repeatable
    """
    out, voice = Path(run), Voice(progress)
    if not (out / layout.RESULTS).is_file():
        state = "an unfinished run; resume it first" if (out / layout.CONFIG).is_file() else "other files"
        raise ConfigError(f"{out}: a report needs {layout.RESULTS} of a finished run, got {state}")
    results = read_json(out / layout.RESULTS)
    if "methods" in results:
        return {"report": str(out / page.REPORT), "missing": demo_report.write(out)}
    if measure or prompt:
        layout.put(out / layout.RESULTS, {**results, **_measured(out, prompt, voice)})
    return {"report": str(out / page.REPORT), "missing": page.write(out)}


def at_the_end(
    ready: Ready, out: Path, precision: Callable[[], AbstractContextManager[Any]], wish: Wish, voice: Voice
) -> None:
    """Measures the findings of a run that has just finished, adds them to results.json, and writes the page.

    Reports all that is missing. A signal ends it; the run is complete without.
    """
    measured = read_json(out / layout.RESULTS)
    try:
        found = findings.examine(
            ready.model,
            NAME,
            ready.task,
            ready.texts,
            run=ready.run,
            voice=voice,
            measured=measured,
            precision=precision,
            between=wish.check,
        )
        layout.put(out / layout.RESULTS, {**measured, **found, "notes": voice.said})
        for sentence in page.write(out):
            voice.say(sentence)
    except (Stop, OSError, NotWritten) as e:
        why = "a signal came" if isinstance(e, Stop) else str(e)
        voice.say(
            f"the run is finished and saved, but its report is not written ({why}): veneer report {out}"
            " --measure"
            " writes it"
        )


def made_up(out: Path, voice: Voice) -> None:
    """Writes the page of a finished run whose end was interrupted before it, with its findings if need be."""
    try:
        results = read_json(out / layout.RESULTS)
        if "base_parameters" not in results:
            layout.put(out / layout.RESULTS, {**results, **_measured(out, (), voice)})
        for sentence in page.write(out):
            voice.say(sentence)
    except (VeneerError, OSError) as e:
        voice.say(f"the report is not written ({e})")


def _measured(out: Path, prompts: Sequence[str], voice: Voice) -> dict[str, Any]:
    """Returns the findings of a finished run, from its files. Raises the errors of reading them."""
    config = drift.record(out)
    run = Run.from_dict(config["run"])
    run, task, texts = read(run, voice)
    differs = drift.differences(config["data"], {part: t.facts for part, t in texts.items()})
    for line in differs:
        voice.say(f"the text differs from the training's: {line}")
    model = base_model.base_again(run, task, out, run.base_dtype, machine.device("auto"))
    store.load(model, out / layout.ADAPTER, NAME)
    as_trained = precision(run, next(model.parameters()).device)
    measured = None if differs else read_json(out / layout.RESULTS)
    return findings.examine(
        model,
        NAME,
        task,
        texts,
        run=run,
        voice=voice,
        prompts=prompts,
        measured=measured,
        precision=as_trained,
    )

"""`veneer report`: the page of a run, written at its end and again from its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer import tasks
from veneer.adapt.store import store
from veneer.analyse.page import demo_report
from veneer.analyse.page import run_report as told
from veneer.errors import ConfigError
from veneer.files import read_json
from veneer.models import machine, pretrained
from veneer.runs import base_model, findings
from veneer.runs.prepare import NAME, Ready, read
from veneer.tasks import Objective
from veneer.train.folder import drift, layout
from veneer.train.loop.progress import Voice
from veneer.train.loop.signals import Stop, Wish
from veneer.train.run import Run


def report(
    run: str, *, measure: bool = False, prompt: Sequence[str] = (), progress: bool = True
) -> dict[str, Any]:
    """Writes report.html into the folder of a finished run, or of a demo: the page's path, and what is missing from it.

    run: folder of the run
    measure: measure the dial, the layers and the samples anew, which reads the model and the texts
    prompt: what the samples continue, instead of beginnings of valid text; measures anew; may be given several times
    """
    out, voice = Path(run), Voice(progress)
    if not (out / layout.RESULTS).is_file():
        state = "an unfinished run; go on with it first" if (out / layout.CONFIG).is_file() else "no run"
        raise ConfigError(
            f"{out} holds {state}: a report is made from {layout.RESULTS}, which a run writes when it is finished"
        )
    results = read_json(out / layout.RESULTS)
    if "methods" in results:
        return {"report": str(out / told.REPORT), "missing": demo_report.write(out)}
    if measure or prompt:
        _keep(out, {**results, **_measured(out, prompt, voice)})
    return {"report": str(out / told.REPORT), "missing": told.write(out)}


def at_the_end(ready: Ready, out: Path, objective: Objective, wish: Wish, voice: Voice) -> None:
    """Measures what a report shows of a run that has just finished, adds it to results.json, and writes the page.

    Whatever is missing is said. A signal ends it; the run is whole without.
    """
    try:
        found = findings.examine(
            ready.model,
            NAME,
            pretrained.tokenizer(ready.run.model),
            ready.texts,
            objective,
            run=ready.run,
            voice=voice,
            between=wish.check,
        )
        _keep(out, {**read_json(out / layout.RESULTS), **found, "notes": voice.said})
        for sentence in told.write(out):
            voice.say(sentence)
    except (Stop, OSError) as e:
        why = "a signal came" if isinstance(e, Stop) else str(e)
        voice.say(
            f"the run is finished and saved, but its report is not written ({why}): veneer report {out} --measure makes it"
        )


def _keep(out: Path, results: dict[str, Any]) -> None:
    layout.put(out / layout.RESULTS, results)


def _measured(out: Path, prompts: Sequence[str], voice: Voice) -> dict[str, Any]:
    """What is measured of a finished run, from its files. Raises what reading texts, model and adapter raise."""
    config = drift.record(out)
    run = Run.from_dict(config["run"])
    run, tokenizer, ready = read(run, voice)
    for line in drift.differences(config["data"], {part: t.facts for part, t in ready.items()}):
        voice.say(f"text differs from what the run was trained on: {line}")
    model = base_model.base_again(run, out, run.base_dtype, machine.device("auto"))
    store.load(model, out / layout.ADAPTER, NAME)
    return findings.examine(
        model, NAME, tokenizer, ready, tasks.get("causal_lm"), run=run, voice=voice, prompts=prompts
    )

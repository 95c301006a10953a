"""Makes results.json of a comparison from its finished trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from veneer.ops.intervals import of_mean
from veneer.search.compare import contenders
from veneer.search.compare.judge import Judge
from veneer.search.compare.training import TRIALS, Training
from veneer.search.decide import grid
from veneer.search.decide.choose import Choice
from veneer.search.decide.reach import SHARE, Reached, reached, reference
from veneer.search.decide.trial import DIVERGED, FINISHED, Progress, Trial
from veneer.search.decide.verdicts import ties_with_best, verdicts
from veneer.train.folder.result import Result
from veneer.train.parts.change import FULL

Finished = Mapping[Trial, Progress]


def table(
    training: Training,
    choices: Mapping[str, Choice],
    repeats: Mapping[str, Sequence[Trial]],
    shorter: Mapping[str, Sequence[Trial]],
    found: Finished,
    judge: Judge,
) -> dict[str, Any]:
    """Returns methods, reference, verdicts and best. repeats: trials over seeds; found: their progress.

    shorter: trials of other lengths, for the front of learning and forgetting.
    """
    metric = training.metric
    results = {t: Result.read(training.folder / TRIALS / t.key) for t in found if found[t].state == FINISHED}
    wanted = _reference(training, repeats, results)
    rows = []
    for label, choice in choices.items():
        own = [t for t in repeats[label] if t in results]
        row = {
            **_scores(own, results),
            **_sizes(own, results),
            **_speed(own, found, wanted, training),
            "seconds": mean([found[t].points[-1].seconds for t in own]) if own else None,
            "front": [
                _front(training, t, results[t], judge)
                for t in sorted([*shorter[label], *repeats[label][:1]], key=lambda t: t.length)
                if t in results
            ],
        }
        lost = [{"seed": t.seed, "reason": found[t].reason} for t in repeats[label] if t not in results]
        rows.append(
            {"label": label, "settings": _settings(training, label), **_rates(training, choice), **row}
        )
        rows[-1]["diverged_seeds"] = lost
    scores = {row["label"]: row["values"] for row in rows if row["values"]}
    calls = verdicts(scores, metric)
    means = {label: mean(values) for label, values in scores.items()}
    return {
        "metric": metric._asdict(),
        "reference": wanted,
        "methods": rows,
        "verdicts": [{**v.as_dict(), "sentence": v.sentence(metric)} for v in calls],
        "best": ties_with_best(calls, means, metric),
    }


def _settings(training: Training, label: str) -> dict[str, Any]:
    run = training.runs[label]
    return {name: getattr(run, name) for name in ("method", "optimiser", "to", "options", *contenders.OF_RUN)}


def _rates(training: Training, choice: Choice) -> dict[str, Any]:
    """Returns the chosen rate and all that were tried, with the reason why each ended early."""
    metric, tried = training.metric, []
    full: dict[float, float] = {}
    for t in choice.tried:
        cost = t.progress.best(metric)
        last = t.progress.points[-1].valid if t.progress.points else None
        best = metric.cost(cost) if math.isfinite(cost) else None  # its own inverse
        if not t.dropped and best is not None:
            full[t.trial.lr] = cost
        state = t.progress.state if not t.dropped or t.progress.state == DIVERGED else "dropped"
        share = t.progress.share
        tried.append(
            {"lr": t.trial.lr, "state": state, "share": share, "best": best, "last": last, "why": t.dropped}
        )
    near = grid.tolerant(full, 0.01 * abs(min(full.values()))) if full else []
    return {"lr": choice.lr, "on_edge": choice.on_edge, "tried": tried, "rates_within_1_percent": near}


def _scores(own: Sequence[Trial], results: Mapping[Trial, Result]) -> dict[str, Any]:
    """Returns the metric on test text over seeds, before and after, and forgetting."""
    if not own:
        return {"text": None, "values": [], "score": None, "before": None, "known": None, "forgotten": None}
    learned = [results[t].learned for t in own]
    forgotten = [f for t in own if (f := results[t].forgotten) is not None]
    return {
        "text": results[own[0]].metrics["learned"]["text"],
        "values": [c.after for c in learned],
        "score": of_mean([c.after for c in learned]).as_dict(),
        "before": mean([c.before for c in learned]),
        "known": of_mean([c.after for c in forgotten]).as_dict() if forgotten else None,
        "forgotten": of_mean([c.after - c.before for c in forgotten]).as_dict() if forgotten else None,
    }


def _sizes(own: Sequence[Trial], results: Mapping[Trial, Result]) -> dict[str, Any]:
    if not own:
        return {"trainable_parameters": None, "adapter_bytes": None}
    return {n: results[own[0]].metrics[n] for n in ("trainable_parameters", "adapter_bytes")}


def _speed(
    own: Sequence[Trial], found: Finished, wanted: Mapping[str, Any], training: Training
) -> dict[str, Any]:
    """Returns steps and seconds to the reference, over the seeds that reach it."""
    hits: list[Reached] = []
    if wanted["value"] is not None:
        hits = [h for t in own if (h := reached(found[t].points, wanted["value"], training.metric))]
    return {
        "reached": len(hits),
        "steps_to_reference": of_mean([h.steps for h in hits]).as_dict() if hits else None,
        "seconds_to_reference": of_mean([h.seconds for h in hits]).as_dict() if hits else None,
    }


def _reference(
    training: Training, repeats: Mapping[str, Sequence[Trial]], results: Mapping[Trial, Result]
) -> dict[str, Any]:
    """Returns 90 % of the gain of full fine-tuning on valid text, or of the best contender without it."""
    metric, gains = training.metric, {}
    for label, trials in repeats.items():
        own = [results[t].metrics for t in trials if t in results]
        if own:
            pairs = [(m["before"]["valid"], m["after"]["valid"]) for m in own]
            gains[label] = (mean([b for b, _ in pairs]), mean([a for _, a in pairs]))
    if not gains:
        return {"of": None, "value": None, "share": SHARE}
    best = min(gains, key=lambda label: metric.cost(gains[label][1]))
    of = FULL if FULL in gains else best
    return {"of": of, "value": reference(*gains[of]), "share": SHARE}


def _front(training: Training, trial: Trial, result: Result, judge: Judge) -> dict[str, Any]:
    """Returns one point of the front: a training of this length, and its dial."""
    dialled = judge.dial(result.folder)
    known = result.forgotten.after if result.forgotten else None
    point = {"length": trial.length, "steps": result.metrics["steps"], "target": result.learned.after}
    return {**point, "known": known, **{k: dialled[k] for k in ("points", "recommended")}}

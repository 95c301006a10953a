"""The cheap form: one training at a high rank, cut to every smaller one and measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.adapt.attached import changes
from veneer.adapt.store import store
from veneer.data.spread import spread
from veneer.errors import ConfigError
from veneer.methods import get, options_of
from veneer.models import machine
from veneer.runs import base_model
from veneer.runs.decide import decided
from veneer.runs.fit import fit
from veneer.runs.prepare import read
from veneer.runs.starts import calibration
from veneer.runs.texts import texts as parts_of
from veneer.search.decide import plateau
from veneer.search.rank import cuts
from veneer.search.rank.settings import RankSearch
from veneer.tasks import Task
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run

NAME = "pilot"
MORE = 0.28  # work of the cuts, as a share of the training; loading the pilot adds its probe, 0.3 in all
PASSES = 2  # of a token that an adapter learns: forward, and backward without gradients of the base
FEWEST = 16  # examples of a text for an interval


def check(run: Run) -> None:
    """Raises ConfigError for a method whose rank cannot be searched."""
    if run.trains_base or "rank" not in options_of(get(run.method)):
        raise ConfigError(f"method must have an option 'rank' to search for, got {run.method!r}; use 'lora'")


def pilot(run: Run, search: RankSearch, voice: Voice) -> dict[str, Any]:
    """Returns curve, rank, pattern and reason, from one training in search.out/pilot.

    Rates hardly depend on the rank, so the run's own is used. Layers too small for the highest rank get the
    largest they can have. The rank is chosen on valid text; scores are of
    test text. Cuts are measured on as many examples as keep their work within 0.3 of the training's, 16 or
    more; work_ratio is the work of all over the training's, counted in tokens.
    """
    out = Path(search.out) / NAME
    run = replace(run, options={**run.options, "rank": search.most})
    rated, task, held = read(decided(run, machine.device(run.device)), Notes())
    device, begun = machine.device(rated.device), time.monotonic()
    model, _ = base_model.base(rated, task, rated.base_dtype, device, Voice(False))
    narrow = {s.name: min(s.out, s.in_) for s in calibration.sites(model, rated)}
    narrow = {name: most for name, most in narrow.items() if most < search.most}
    run = replace(run, rank_pattern={**narrow, **run.rank_pattern})
    before = time.monotonic()
    result = fit(replace(run, out=str(out), resume=True, report=False), progress=voice.aloud)
    training = time.monotonic() - before
    store.load(model, result.adapter, NAME, allow="zero")
    every, trained = parts_of.evaluated(held, rated, task), result.metrics["tokens"]
    examples, measured = _affordable(every, task, trained, len(search.ranks), voice)
    with voice.phase("measuring cuts of the pilot"):
        found = cuts.curve(model, NAME, task, examples["valid"], search.ranks, batch=run.batch)
        answer = plateau.of_pilot(found, search.tolerance)
        pattern = cuts.pattern(model, NAME, answer.rank)
        uniform = {s.name: min(answer.rank, s.out, s.in_) for s, _ in changes(model, NAME)}
        scores = {
            word: cuts.measured_by(model, NAME, task, examples["test"], ranks, batch=run.batch).value
            for word, ranks in (("uniform", uniform), ("by_energy", pattern))
        }
    per_rank = sum(site.out + site.in_ for site, _ in changes(model, NAME))
    return {
        "form": "pilot",
        "metric": task.METRIC._asdict(),
        "curve": {rank: short._asdict() for rank, short in found.items()},
        **answer._asdict(),
        "rank_pattern": pattern,
        "narrow": narrow,
        "test": {"pilot": result.learned.after, "before": result.learned.before, **scores},
        "capacity_floor": plateau.floor(sum(map(task.labels, held["train"].examples)), per_rank),
        "lr": rated.lr,
        "pilot_steps": result.metrics["steps"],
        "training_seconds": training,
        "work_ratio": 1 + measured / (PASSES * trained),
        "cost_ratio": (time.monotonic() - begun) / training,
    }


def _affordable(
    examples: Mapping[str, Sequence[Any]], task: Task, trained: int, ranks: int, voice: Voice
) -> tuple[dict[str, Sequence[Any]], int]:
    """Returns the texts to measure cuts on, and the tokens that all cuts then take.

    trained: tokens of the training; ranks: cuts on valid text, beside two on test text.
    """
    passes, most = {"valid": ranks, "test": 2}, MORE * PASSES * trained
    sizes = {part: sum(map(task.size, examples[part])) for part in passes}
    share = min(1.0, most / max(1, sum(passes[part] * sizes[part] for part in passes)))
    kept: dict[str, Sequence[Any]] = {}
    for part in passes:
        every = examples[part]
        kept[part] = spread(every, max(min(FEWEST, len(every)), int(share * len(every))))
        if len(kept[part]) < len(every):
            words = f"cuts are measured on {len(kept[part])} of {len(every)} examples of {part} text"
            voice.say(f"{words}, so that the search stays cheap beside its training")
    return kept, sum(n * sum(map(task.size, kept[part])) for part, n in passes.items())

"""The cheap form: one training at a high rank, cut to every smaller one and measured."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.adapt.attached import changes
from veneer.adapt.store import store
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
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run

NAME = "pilot"


def check(run: Run) -> None:
    """Raises ConfigError for a method whose rank cannot be searched."""
    if run.trains_base or "rank" not in options_of(get(run.method)):
        raise ConfigError(f"method must have an option 'rank' to search for, got {run.method!r}; use 'lora'")


def pilot(run: Run, search: RankSearch, voice: Voice) -> dict[str, Any]:
    """Returns curve, rank, pattern and reason, from one training in search.out/pilot.

    Rates hardly depend on the rank, so the run's own is used. Layers too small for the highest rank get the
    largest they can have. The rank is chosen on valid text; scores are of
    test text.
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
    examples = parts_of.evaluated(held, rated, task)
    with voice.phase("measuring cuts of the pilot"):
        found = cuts.curve(model, NAME, task, examples["valid"], search.ranks, batch=run.batch)
        answer = plateau.of_pilot(found, search.tolerance)
        uniform = {s.name: min(answer.rank, s.out, s.in_) for s, _ in changes(model, NAME)}
        pattern = cuts.pattern(model, NAME, answer.rank)
        scores = {
            word: cuts.measured_by(model, NAME, task, examples["test"], ranks, batch=run.batch).value
            for word, ranks in (("uniform", uniform), ("by_energy", pattern))
        }
    per_rank = sum(site.out + site.in_ for site, _ in changes(model, NAME))
    labels = sum(map(task.labels, held["train"].examples))
    return {
        "form": "pilot",
        "metric": task.METRIC._asdict(),
        "curve": {rank: short._asdict() for rank, short in found.items()},
        "rank": answer.rank,
        "reason": answer.reason,
        "rank_pattern": pattern,
        "narrow": narrow,
        "test": {"pilot": result.learned.after, "before": result.learned.before, **scores},
        "capacity_floor": plateau.floor(labels, per_rank),
        "lr": rated.lr,
        "pilot_steps": result.metrics["steps"],
        "training_seconds": training,
        "cost_ratio": (time.monotonic() - begun) / training,
    }

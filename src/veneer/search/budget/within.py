"""Trains a few candidates, turns their dials, and keeps the best one within a bound on forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer.adapt.attach import detach
from veneer.adapt.store import store
from veneer.adapt.switch import using
from veneer.data.reading import NO_TEXT
from veneer.errors import ConfigError, SiteError, option
from veneer.files import read_json
from veneer.models import machine
from veneer.ops import bootstrap
from veneer.runs.decide import decided
from veneer.runs.fit import fit
from veneer.search.compare import texts
from veneer.search.compare.judge import Judge
from veneer.search.decide import budget
from veneer.search.decide.budget import Offer
from veneer.tasks import Figure
from veneer.train.folder import layout
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

FILE, TRIED, NAME = "budget.json", "tried", "within"
STRENGTHS = tuple(i / 8 for i in range(1, 9))


def fit_within(run: Run, limit: float, *, progress: bool = True) -> dict[str, Any]:
    """Returns budget.json: the candidate and strength that learn most while forgetting at most `limit`.

    limit: share of the metric on known text, such as 0.01. Chosen on valid text and half of known text, with
    95 % confidence; checked on test text and the other half. The same call goes on with one that was stopped.
    Raises the errors of `fit`, and ConfigError without known text.
    """
    if not 0 < limit < 1:
        raise ConfigError(f"{option('forget_at_most')} must be above 0 % and below 100 %, got {limit:.3g}")
    voice, out = Voice(progress), Path(run.out)
    shared = texts.complete(run, out, voice)
    if shared.known in ((), (NO_TEXT,)):
        known = option("known")
        raise ConfigError(f"{option('forget_at_most')} measures forgetting on known text; give {known}")
    if (out / FILE).is_file():
        voice.say(f"{out} is finished already; its result is returned unchanged")
        return read_json(out / FILE, ("chosen", "reason"))
    lr = decided(shared, machine.device(run.device)).lr
    tried = _trained(replace(shared, lr=lr), out, voice)
    judge = Judge(shared, voice)
    looks = {name: _Look(judge, folder) for name, folder in tried.items()}
    level = budget.level(len(looks))
    offers = {name: look.offers(level) for name, look in looks.items()}
    base = next(iter(looks.values())).base_cost
    chosen = budget.pick(offers, limit, base)
    voice.say(chosen.reason)
    made: dict[str, Any] = {"limit": limit, "confidence": budget.CONFIDENCE, "reason": chosen.reason}
    made |= {"candidates": {name: [o._asdict() for o in some] for name, some in offers.items()}}
    made |= {"chosen": None, "folder": str(out)}
    if chosen.name is not None and chosen.offer is not None:
        test = looks[chosen.name].tested(chosen.offer.strength)
        place = {"name": chosen.name, "run": str(tried[chosen.name]), "strength": chosen.offer.strength}
        made["chosen"] = {**place, **test, "held": test["forgot"] <= limit}
    layout.put(out / FILE, made)
    return made


def candidates(run: Run) -> dict[str, Run]:
    """Returns the trainings to try: as given, at half the rate, and on MLP layers alone."""
    found = {"as given": run, "half the rate": replace(run, lr=(run.lr or 1.0) / 2)}
    if not run.trains_base and run.to is None:
        found["MLP layers"] = replace(run, to="mlp")
    return found


def _trained(run: Run, out: Path, voice: Voice) -> dict[str, Path]:
    """Trains the candidates and returns their folders; one whose layers the model lacks is left out."""
    found = {}
    for name, own in candidates(run).items():
        folder = out / TRIED / name.replace(" ", "-").lower()
        try:
            fit(replace(own, out=str(folder), resume=True, report=False), progress=voice.aloud)
        except SiteError as e:
            voice.say(f"{name}: left out: {e}")
            continue
        found[name] = folder
    return found


class _Look:
    """Measures one candidate at its strengths."""

    def __init__(self, judge: Judge, folder: Path) -> None:
        self.judge, self.folder = judge, folder
        task, model, held = judge.opened
        self.task, self.model = task, model
        self.valid, self.test, known = held["valid"], held["test"], held["known"]
        self.choosing, self.checking = known[::2], known[1::2]
        with using(model):
            self.base_cost = task.METRIC.cost(self._figure(self.valid).value)
            self.base_known = self._figure(self.choosing)

    def offers(self, level: float) -> list[Offer]:
        """Returns the offer of every strength. level: of the interval whose upper end is the bound."""
        found = []
        store.load(self.model, self.folder / layout.ADAPTER, NAME, allow="zero")
        try:
            for strength in STRENGTHS:
                with using(self.model, {NAME: strength}):
                    cost = self.task.METRIC.cost(self._figure(self.valid).value)
                    forgot, most = forgotten(self._figure(self.choosing), self.base_known, level)
                found.append(Offer(strength, cost, forgot, most))
        finally:
            detach(self.model)
        return found

    def tested(self, strength: float) -> dict[str, float]:
        """Returns new text's score and the share forgotten on the texts that nothing was chosen on."""
        with using(self.model):
            before, known = self._figure(self.test).value, self._figure(self.checking)
        store.load(self.model, self.folder / layout.ADAPTER, NAME, allow="zero")
        try:
            with using(self.model, {NAME: strength}):
                after, forgot = (
                    self._figure(self.test).value,
                    forgotten(self._figure(self.checking), known)[0],
                )
        finally:
            detach(self.model)
        return {"before": before, "after": after, "forgot": forgot}

    def _figure(self, examples: Sequence[Any]) -> Figure:
        return self.task.measure(self.model, examples, batch=self.judge.run.batch, each=True)[0]


def forgotten(after: Figure, before: Figure, level: float = budget.CONFIDENCE) -> tuple[float, float | None]:
    """Returns the relative loss on the same examples, and the upper end of its interval, None for too few."""
    cost, whole = after.metric.cost, abs(before.value)
    share = (cost(after.value) - cost(before.value)) / whole
    if after.parts is None or before.parts is None or after.weights is None:
        return share, None
    sign = 1 if after.lower_is_better else -1
    found = bootstrap.interval(sign * (after.parts - before.parts), after.weights, level=level)
    return share, None if found is None else found[1] / whole


def text(found: Mapping[str, Any]) -> str:
    """Returns the outcome for people."""
    chosen = found["chosen"]
    if chosen is None:
        return found["reason"]  # type: ignore[no-any-return]
    kept = "holds" if chosen["held"] else "does NOT hold"
    score = f"new text {chosen['before']:.4f} -> {chosen['after']:.4f}"
    test = (
        f"on test text: {score}, forgotten {chosen['forgot']:.2%}: the bound of {found['limit']:.2%} {kept}"
    )
    use = f"next: veneer generate PROMPT --adapter {chosen['run']}@{chosen['strength']:g}"
    return "\n".join([found["reason"], test, use])

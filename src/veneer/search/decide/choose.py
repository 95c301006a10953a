"""Chooses each contender's learning rate on valid text, all contenders rung by rung."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from veneer.search.decide import grid
from veneer.search.decide.halving import FINALISTS, RUNGS, survivors
from veneer.search.decide.trial import DIVERGED, Progress, Trainer, Trial


class Tried(NamedTuple):
    """One trial of the search: its last progress, and why it ended early or ""."""

    trial: Trial
    progress: Progress
    dropped: str


class Choice(NamedTuple):
    """The rate of one contender, and all that was tried for it; lr is None if every trial diverged."""

    lr: float | None
    tried: list[Tried]
    on_edge: bool = False


def choose(trainer: Trainer, grids: Mapping[str, Sequence[float]], seed: int) -> dict[str, Choice]:
    """Returns the best rate of every contender, by trials at one seed.

    grids: rates by contender. Trials of all contenders go from rung to rung together, so that they can share
    passes; halving and edges are each contender's own.
    """
    pools = {label: [Trial(label, lr, seed) for lr in rates] for label, rates in grids.items()}
    found = halve(trainer, pools)
    for _ in range(grid.EXTENSIONS):
        further = {
            label: Trial(label, rate, seed)
            for label, tried in found.items()
            if (rate := grid.beyond(_by_rate(trainer, tried))) is not None
        }
        if not further:
            break
        for label, tried in _against(trainer, further, found).items():
            found[label] = sorted([*found[label], tried], key=lambda t: t.trial.lr)
    return {label: _chosen(trainer, tried) for label, tried in found.items()}


def halve(
    trainer: Trainer, pools: Mapping[str, Sequence[Trial]], least: int = FINALISTS
) -> dict[str, list[Tried]]:
    """Trains pools side by side; the worse half of each ends at every rung, the rest is trained in full."""
    left = {name: list(trials) for name, trials in pools.items()}
    ended: dict[str, list[Tried]] = {name: [] for name in pools}
    for share in (*RUNGS, 1.0):
        progress = trainer.advance([t for trials in left.values() for t in trials], share)
        for name, trials in left.items():
            costs = {t: progress[t].cost(share, trainer.steps, trainer.metric) for t in trials}
            kept = set(survivors(costs, least) if share < 1 else trials)
            for t in trials:
                if t not in kept or share == 1:
                    ended[name].append(Tried(t, progress[t], _reason(trainer, t, progress[t], share, costs)))
            left[name] = [t for t in trials if t in kept]
    return {name: sorted(tried, key=lambda t: t.trial.lr) for name, tried in ended.items()}


def _reason(
    trainer: Trainer, trial: Trial, progress: Progress, share: float, costs: Mapping[Trial, float]
) -> str:
    """Returns why a trial ends here, and records it; "" for one that is trained in full."""
    if progress.state == DIVERGED:
        return progress.reason
    if share == 1:
        return ""
    place = 1 + sum(cost < costs[trial] for cost in costs.values())
    reason = f"place {place} of {len(costs)} after {share:.3g} of the steps"
    trainer.drop(trial, share, reason)
    return reason


def _by_rate(trainer: Trainer, tried: Sequence[Tried]) -> dict[float, float]:
    """Returns costs by rate: of full trainings their best, above all of them for those that ended early."""
    full = {t.trial.lr: t.progress.best(trainer.metric) for t in tried if not t.dropped}
    most = max((c for c in full.values() if math.isfinite(c)), default=0.0)
    early = {
        t.trial.lr: math.inf if t.progress.state == DIVERGED else most + 1.0 + abs(most)
        for t in tried
        if t.dropped
    }
    return {**early, **full}


def _against(
    trainer: Trainer, further: Mapping[str, Trial], found: Mapping[str, Sequence[Tried]]
) -> dict[str, Tried]:
    """Trains one more trial of each contender, up to the first rung where all finalists were better."""
    left, ended = dict(further), dict[str, Tried]()
    for share in (*RUNGS, 1.0):
        progress = trainer.advance(list(left.values()), share) if left else {}
        for label, trial in list(left.items()):
            own = progress[trial]
            rivals = [t.progress for t in found[label] if not t.dropped]
            most = max((r.cost(share, trainer.steps, trainer.metric) for r in rivals), default=math.inf)
            reason = own.reason
            if not reason and share < 1 and own.cost(share, trainer.steps, trainer.metric) > most:
                reason = f"behind all finalists after {share:.3g} of the steps"
                trainer.drop(trial, share, reason)
            if reason or share == 1:
                ended[label] = Tried(left.pop(label), own, reason)
    return ended


def _chosen(trainer: Trainer, tried: list[Tried]) -> Choice:
    costs = _by_rate(trainer, tried)
    full = {t.trial.lr for t in tried if not t.dropped and math.isfinite(costs[t.trial.lr])}
    if not full:
        return Choice(None, tried)
    best = min(full, key=lambda lr: costs[lr])
    return Choice(best, tried, best in (min(costs), max(costs)))

"""The full form: a rate tuned once, then rising ranks until a doubling gains too little, then layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from veneer.ops.intervals import of_mean
from veneer.search.compare import contenders
from veneer.search.decide import grid, plateau
from veneer.search.decide.choose import choose
from veneer.search.decide.plateau import Answer
from veneer.search.decide.trial import Trainer, Trial
from veneer.search.decide.verdicts import ties_with_best, verdicts
from veneer.search.rank.settings import RankSearch
from veneer.train.run import Run

TARGETS = ("attention", "mlp", "all-linear")
TUNED = 8  # the rank at which the rate is tuned: the best rate hardly depends on it


def label(rank: int, target: str = "") -> str:
    """Returns the contender's name of a rank on some layers, the run's own unless given."""
    return f"r{rank}{target and '-'}{target}"


def runs(run: Run, search: RankSearch) -> dict[str, Run]:
    """Returns the run of every rank, and of ranks on groups of layers, by label."""
    found = {label(r): replace(run, options={**run.options, "rank": r}) for r in search.ranks}
    tuned = min(TUNED, search.most)
    found |= {label(tuned): replace(run, options={**run.options, "rank": tuned})}
    if search.widen:
        found |= {label(r, t): replace(found[label(r)], to=t) for r in search.ranks for t in TARGETS}
    return found


def sweep(trainer: Trainer, run: Run, search: RankSearch, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns rate, curve, rank, reason and the table of ranks and layers."""
    tuned = label(min(TUNED, search.most))
    centre = run.lr or contenders.centre(run)
    choice = choose(trainer, {tuned: grid.around(centre, search.rates)}, run.seed)[tuned]
    if choice.lr is None:
        return {"form": "sweep", "lr": None, "rank": None, "reason": "every rate diverged", "curve": {}}
    seeds = [run.seed + i for i in range(search.seeds)]
    costs, answer, spent = dict[int, list[float]](), None, 0.0
    for rank in search.ranks:
        if search.max_cost is not None and spent + len(seeds) > search.max_cost:
            break
        costs[rank] = _costs(trainer, label(rank), choice.lr, seeds)
        spent += len(seeds)
        say(f"rank {rank}: {_words(trainer, costs[rank])}")
        answer = plateau.of_sweep(_finite(costs), search.tolerance)
        if answer is not None:
            break
    answer = answer or _last(costs)
    table = _widened(trainer, choice.lr, seeds, answer.rank) if search.widen and costs else {}
    return {
        "form": "sweep",
        "metric": trainer.metric._asdict(),
        "lr": choice.lr,
        "curve": {rank: _interval(trainer, values) for rank, values in costs.items()},
        "rank": answer.rank,
        "reason": answer.reason,
        "trainings": spent,
        "table": {name: _interval(trainer, values) for name, values in table.items()},
        "layers": _layers(trainer, table),
    }


def _last(costs: Mapping[int, Sequence[float]]) -> Answer:
    if not costs:
        return Answer(1, "max_cost leaves no training: raise it")
    most = max(costs)
    return Answer(
        most, f"every doubling up to rank {most} gains more than noise: the need may be higher still"
    )


def _costs(trainer: Trainer, name: str, lr: float, seeds: Iterable[int]) -> list[float]:
    trials = [Trial(name, lr, seed) for seed in seeds]
    progress = trainer.advance(trials, 1.0)
    return [progress[t].best(trainer.metric) for t in trials]


def _finite(costs: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    kept = {rank: [c for c in values if math.isfinite(c)] for rank, values in costs.items()}
    return {rank: values for rank, values in kept.items() if values}


def _widened(trainer: Trainer, lr: float, seeds: Sequence[int], rank: int) -> dict[str, list[float]]:
    """Returns the costs of rank 1 and of the chosen rank on each group of layers."""
    return {label(r, t): _costs(trainer, label(r, t), lr, seeds) for r in sorted({1, rank}) for t in TARGETS}


def _layers(trainer: Trainer, table: Mapping[str, Sequence[float]]) -> str:
    """Returns a sentence on the groups of layers."""
    scores = {n: [trainer.metric.cost(c) for c in v if math.isfinite(c)] for n, v in table.items()}
    scores = {n: v for n, v in scores.items() if v}
    if not scores:
        return ""
    calls = verdicts(scores, trainer.metric)
    best, *ties = ties_with_best(calls, {n: mean(v) for n, v in scores.items()}, trainer.metric)
    return f"{best} is best of the ranks and layers" + (f"; {', '.join(ties)} tie with it" if ties else "")


def _interval(trainer: Trainer, costs: Sequence[float]) -> dict[str, Any] | None:
    values = [trainer.metric.cost(c) for c in costs if math.isfinite(c)]
    return of_mean(values).as_dict() if values else None


def _words(trainer: Trainer, costs: Sequence[float]) -> str:
    found = _interval(trainer, costs)
    return "diverged" if found is None else f"{found['mean']:.4g} {trainer.metric.words}"

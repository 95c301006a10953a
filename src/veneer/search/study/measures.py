"""Measures of one finished trial beyond its scores: ranks, intruders, and drift of hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attach import detach
from veneer.adapt.attached import changes
from veneer.adapt.store import store
from veneer.adapt.switch import using
from veneer.analyse.activations import gram_distortion, hidden_states, linear_cka, procrustes
from veneer.analyse.drift import drift
from veneer.analyse.intruders import n_intruders
from veneer.analyse.profiles import Profile, profiles
from veneer.analyse.spectra import Spectrum, spectra
from veneer.files import read_json
from veneer.search.compare.judge import Judge
from veneer.search.study.answers import answered
from veneer.search.study.sources import Asked
from veneer.sites import LeafSite
from veneer.sites.roles import output_head, plays
from veneer.tasks import Task
from veneer.train.folder import layout

FILE, NAME, PROFILE = "measures.json", "studied", "profile"
ROWS = 4  # examples of known text whose hidden states are compared


def measured(judge: Judge, trial: Path, questions: Sequence[Asked] = ()) -> dict[str, Any]:
    """Returns ranks by role, intruders, drift and profiles of a finished trial; kept in its folder.

    questions: to answer exactly, and to sample the diversity of answers to.
    """
    file = trial / FILE
    if not file.is_file() or PROFILE not in read_json(file):
        task, model, held = judge.opened
        store.load(model, trial / layout.ADAPTER, NAME, allow="zero")
        try:
            found = {**_of_weights(model), **_of_activations(model, task, held)}
            found[PROFILE] = _profile(model, task, held)
            if questions:
                with using(model, NAME):
                    found["answers"] = answered(model, task.processor, questions)
        finally:
            detach(model)
        layout.put(file, found)
    return read_json(file, ("energy_rank",))


def _of_weights(model: nn.Module) -> dict[str, Any]:
    head = output_head(model)
    found = [s for s in spectra(model, NAME) if s.site.removesuffix(".weight") not in head and s.norm > 0]
    inside = [s for s in found if _inside(s.site)]
    counts = [n_intruders(W, D) for W, D in _matrices(model)]
    return {
        "energy_rank": median([s.energy_rank for s in inside]) if inside else None,
        "by_role": {role: _median(inside, role) for role in ("attention", "mlp")},
        "relative_norm": mean([s.relative for s in inside]) if inside else None,
        "intruders": sum(counts),
        "matrices": len(counts),
    }


def _median(found: list[Spectrum], role: str) -> float | None:
    ranks = [s.energy_rank for s in found if plays(s.site, role)]
    return median(ranks) if ranks else None


def _matrices(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields W and D of every linear layer in the blocks that changed."""
    for site, delta in changes(model, NAME):
        if not _inside(site.name):
            continue
        if isinstance(site, LeafSite):
            W, D = site.split(site.weight()), site.split(delta.delta(site))
            yield from ((W[n], D[n]) for n in W if W[n].ndim == 2)
        elif site.is_matrix:
            yield site.weight(), delta.delta(site)


@torch.no_grad()
def _of_activations(model: nn.Module, task: Task, held: dict[str, list[Any]]) -> dict[str, Any]:
    """Returns CKA and Procrustes distance of the middle block's output on known text, base against tuned."""
    inputs = _known(task, held)
    with using(model):
        before = hidden_states(model, task.body(model), inputs)
    with using(model, NAME):
        after = hidden_states(model, task.body(model), inputs)
    own = {"cka": linear_cka(before, after), "procrustes": procrustes(before, after)}
    return {**own, "gram": gram_distortion(before, after)}


def _known(task: Task, held: dict[str, list[Any]]) -> Any:
    """Returns the model's arguments for a batch of known text."""
    return task.inputs(task.collate(held.get("known", held["test"])[:ROWS]))


def _profile(model: nn.Module, task: Task, held: dict[str, list[Any]]) -> dict[str, float] | None:
    """Returns means over the matrices in the blocks of PEFT-Arena's profiles and of the angles to the base.

    Retention is relative to the base's values; angles are the smallest of each matrix, in degrees.
    """
    found = [p for p in profiles(model, NAME) if _inside(p.site) and p.outputs]
    moved = [d for d in drift(model, NAME, _known(task, held)) if _inside(d.site)]
    if not found or not moved:
        return None

    def of(value: Callable[[Profile], float]) -> float:
        return mean(map(value, found))

    return {
        "retention": of(lambda p: mean(p.retention) / mean(p.values)),
        "adaptation": of(lambda p: mean(p.adaptation)),
        "cosine": of(lambda p: mean(p.cosines)),
        "stable_rank": of(lambda p: p.stable_rank),
        "outputs": of(lambda p: min(p.outputs)),
        "inputs": of(lambda p: min(p.inputs)),
        "drift": mean(d.relative for d in moved),
        "drift_unit": mean(d.unit for d in moved),
    }


def _inside(site: str) -> bool:
    return plays(site, "attention") or plays(site, "mlp")

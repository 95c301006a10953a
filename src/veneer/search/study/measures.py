"""Measures of one finished trial beyond its scores: ranks, intruders, and drift of hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attach import detach
from veneer.adapt.attached import changes
from veneer.adapt.store import store
from veneer.adapt.switch import using
from veneer.analyse.activations import hidden_states, linear_cka, procrustes
from veneer.analyse.intruders import n_intruders
from veneer.analyse.spectra import Spectrum, spectra
from veneer.files import read_json
from veneer.search.compare.judge import Judge
from veneer.sites import LeafSite
from veneer.sites.roles import output_head, plays
from veneer.tasks import Task
from veneer.train.folder import layout

FILE, NAME = "measures.json", "studied"
ROWS = 4  # examples of known text whose hidden states are compared


def measured(judge: Judge, trial: Path) -> dict[str, Any]:
    """Returns ranks by role, intruders and drift of a finished trial; kept in its folder."""
    file = trial / FILE
    if not file.is_file():
        task, model, held = judge.opened
        store.load(model, trial / layout.ADAPTER, NAME, allow="zero")
        try:
            found = {**_of_weights(model), **_of_activations(model, task, held)}
        finally:
            detach(model)
        layout.put(file, found)
    return read_json(file, ("energy_rank",))


def _of_weights(model: nn.Module) -> dict[str, Any]:
    head = output_head(model)
    found = [s for s in spectra(model, NAME) if s.site.removesuffix(".weight") not in head and s.norm > 0]
    inside = [s for s in found if plays(s.site, "attention") or plays(s.site, "mlp")]
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
        if not (plays(site.name, "attention") or plays(site.name, "mlp")):
            continue
        if isinstance(site, LeafSite):
            W, D = site.split(site.weight()), site.split(delta.delta(site))
            yield from ((W[n], D[n]) for n in W if W[n].ndim == 2)
        elif site.is_matrix:
            yield site.weight(), delta.delta(site)


@torch.no_grad()
def _of_activations(model: nn.Module, task: Task, held: dict[str, list[Any]]) -> dict[str, Any]:
    """Returns CKA and Procrustes distance of the middle block's output on known text, base against tuned."""
    examples = held.get("known", held["test"])[:ROWS]
    inputs = task.inputs(task.collate(examples))
    with using(model):
        before = hidden_states(model, task.body(model), inputs)
    with using(model, NAME):
        after = hidden_states(model, task.body(model), inputs)
    return {"cka": linear_cka(before, after), "procrustes": procrustes(before, after)}

"""Cuts an adapter to smaller ranks, uniform or by the energy of its layers, and measures each cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attach import detach
from veneer.adapt.combine import as_lora, of_matrices, to_lora
from veneer.adapt.hooks import hang
from veneer.adapt.switch import using
from veneer.methods import Delta
from veneer.ops import bootstrap
from veneer.ops.allocate import Choice, heap
from veneer.ops.matrix.linalg import precise, product_spectrum
from veneer.ops.matrix.truncate import truncate, truncate_product
from veneer.search.decide.plateau import Short
from veneer.sites import Site
from veneer.tasks import Figure, Task

CUT = "cut"  # the name of a cut adapter


@torch.no_grad()
def curve(
    model: nn.Module, name: str, task: Task, examples: Sequence[Any], ranks: Sequence[int], *, batch: int
) -> dict[int, Short]:
    """Returns the cost of adapter `name` cut to every rank, and its shortfall from the largest.

    ranks: rising, the last the adapter's own. Intervals are paired over examples.
    """
    figures: dict[int, Figure] = {}
    for rank in ranks:
        if rank == ranks[-1]:
            figures[rank] = _measured(model, name, task, examples, batch)
            continue
        to_lora(model, name, CUT, rank=rank)
        try:
            figures[rank] = _measured(model, CUT, task, examples, batch)
        finally:
            detach(model, CUT)
    whole = figures[ranks[-1]]
    return {rank: short(figure, whole) for rank, figure in figures.items()}


def short(figure: Figure, whole: Figure) -> Short:
    """Returns the shortfall of a figure from that of the whole adapter on the same examples."""
    cost = figure.metric.cost
    gap = cost(figure.value) - cost(whole.value)
    parts = (figure.parts, figure.weights, whole.parts)
    if figure is whole or any(p is None for p in parts):
        return Short(cost(figure.value), gap)
    assert figure.parts is not None and whole.parts is not None and figure.weights is not None
    sign = 1 if figure.lower_is_better else -1
    found = bootstrap.interval(sign * (figure.parts - whole.parts), figure.weights)
    return Short(cost(figure.value), gap, *(found or (None, None)))


def _measured(model: nn.Module, name: str, task: Task, examples: Sequence[Any], batch: int) -> Figure:
    with using(model, name):
        return task.measure(model, examples, batch=batch, each=True)[0]


@torch.no_grad()
def pattern(model: nn.Module, name: str, rank: int) -> dict[str, int]:
    """Returns a rank for every layer, with the parameters of a uniform `rank`, that keeps most energy.

    Energy is the squared norm of a change. Each layer gets one rank or more, and at most the adapter's.
    """
    spectra = {site.name: (site.out + site.in_, values) for site, values in _spectra(model, name)}
    menus = [_menu(cost, values) for cost, values in spectra.values()]
    budget = sum(min(rank, len(values)) * cost for cost, values in spectra.values())
    chosen = heap(menus, budget)
    return {site: i + 1 for site, i in zip(spectra, chosen, strict=True)}


def _menu(cost: int, values: Tensor) -> list[Choice]:
    """Returns a choice for every rank of a layer: its parameters, and the energy it leaves out."""
    energy = values.double().square()
    left = (energy.sum() - energy.cumsum(0)).clamp_min(0)
    return [Choice((i + 1) * cost, float(loss)) for i, loss in enumerate(left)]


def _spectra(model: nn.Module, name: str) -> Any:
    for site, delta in of_matrices(model, name):
        f = delta.factors(site)
        product = f is not None and f.is_product
        values = (
            product_spectrum(f.B, f.A) if f and product else torch.linalg.svdvals(precise(delta.delta(site)))
        )
        yield site, values


@torch.no_grad()
def cut_by(model: nn.Module, name: str, new: str, ranks: Mapping[str, int]) -> None:
    """Attaches adapter `name` with each layer cut to its own rank as the LoRA adapter `new`."""
    made: list[tuple[Site, Delta]] = []
    for site, delta in of_matrices(model, name):
        f, rank = delta.factors(site), ranks[site.name]
        product = f is not None and f.is_product
        cut = truncate_product(f.B, f.A, rank) if f and product else truncate(delta.delta(site), rank)
        made.append((site, as_lora(site, cut.A, cut.B)))
    hang(model, new, made)


def measured_by(
    model: nn.Module, name: str, task: Task, examples: Sequence[Any], ranks: Mapping[str, int], *, batch: int
) -> Figure:
    """Returns the figure of the adapter with each layer cut to its own rank."""
    cut_by(model, name, CUT, ranks)
    try:
        return _measured(model, CUT, task, examples, batch)
    finally:
        detach(model, CUT)

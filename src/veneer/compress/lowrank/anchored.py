"""Approximates a layer's original outputs from the inputs that compressed layers give it (reduced-rank
regression).

min E |W x - W^ x^ - b|^2 over W^ of rank r: x enters the original layer, x^ the compressed one. Layers are
replaced in the order of their calls, those of one input together, and the inputs are measured anew after each
replacement. AA-SVD 2026, objective 4, https://arxiv.org/abs/2604.02119; here with means and with a metric of
the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.compress.lowrank.candidates import Candidate
from veneer.compress.lowrank.moments import Moments, Watch, rows
from veneer.compress.lowrank.recipe import Recipe
from veneer.compress.lowrank.survey import inputs_metric
from veneer.compress.lowrank.walk import Entered
from veneer.ops.matrix.linalg import precise
from veneer.ops.matrix.whitening import decompose
from veneer.sites import Site

Put = Callable[[str, Candidate], None]


def replace_in_order(
    i: int,
    block: nn.Module,
    small: nn.Module,
    sites: Mapping[str, Site],
    entered: Sequence[Entered],
    streams: tuple[Sequence[Tensor], Sequence[Tensor]],
    recipe: Recipe,
    outputs: Mapping[str, Tensor | None],
    put: Put,
) -> None:
    """Calls `put(name, candidate)`, which replaces a layer in `small`, for every layer in the order of their
    calls.

    streams: hidden states (b, t, width) that enter the original block and the compressed one. outputs: the
    metric R
    (out, out) of each layer's outputs, or None.

    """
    here, there = streams
    for group in _groups(i, block, sites, entered[0], here[0]):
        first = group[0]
        original, given, cross = Moments(), Moments(), None
        for e, x, z in zip(entered, here, there, strict=True):
            a = _inputs(i, block, first, e, x)
            b = _inputs(i, small, first, e, z)
            original.add(a)
            given.add(b)
            both = precise(a).mT @ precise(b)
            cross = both if cross is None else cross + both
        assert cross is not None
        for name in group:
            put(name, _candidate(sites[name], original, given, cross, outputs[name], recipe))


def _candidate(
    site: Site, original: Moments, given: Moments, cross: Tensor, R: Tensor | None, recipe: Recipe
) -> Candidate:
    centred = recipe.adds_bias
    E = cross.double() / max(original.n, 1)
    if centred:
        E = E - torch.outer(original.mean, given.mean)
    C = inputs_metric(given, centred)
    # The same share of the diagonal on both, so that equal inputs leave W unchanged at full rank.
    E = E + torch.diag_embed(C.diagonal() - given.moment(centred).diagonal())
    W = site.weight().detach()
    parts = decompose(W, C, R, cross=E)
    mean = original.mean if centred else None
    found = Candidate.of(parts, parts.S.square(), mean, precise(W).dtype)
    return found._replace(anchor=given.mean if centred else None)


def _groups(i: int, block: nn.Module, sites: Mapping[str, Site], e: Entered, x: Tensor) -> list[list[str]]:
    """Names of the layers that read one input, in the order of their calls."""
    watch, order = Watch(sites), []
    handles = [
        s.module.register_forward_pre_hook(lambda module, args, n=n: order.append(n))
        for n, s in sites.items()
    ]
    try:
        with watch.over(e.mask), torch.no_grad():
            e.run(i, block, x)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, list[str]] = {}
    for name in dict.fromkeys(order):
        found.setdefault(id(watch.inputs[name]), []).append(name)
    return list(found.values())


class _Reached(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


@torch.no_grad()
def _inputs(i: int, block: nn.Module, name: str, e: Entered, hidden: Tensor) -> Tensor:
    """The rows (n, in) that enter one layer of the block."""
    caught: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    handle = block.get_submodule(name).register_forward_pre_hook(stop)
    try:
        e.run(i, block, hidden)
    except _Reached:
        pass
    finally:
        handle.remove()
    return rows(caught[0], e.mask)

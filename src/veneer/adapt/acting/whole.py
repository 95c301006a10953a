"""Lets changes of whole modules act: the module runs with W' in place of W, with all its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.acting.forward import Deltas
from veneer.adapt.acting.recomputation import note, refuse_other_state
from veneer.sites import LeafSite


def changed_weight(deltas: Deltas) -> Tensor:
    """Returns W' (n, 1) of a whole module: W and the sum of the acting changes at their strengths."""
    D = sum(strength * deltas[name].delta(deltas.site) for name, strength in deltas.active.items())
    W: Tensor = deltas.site.weight() + D
    return W


# Hooks are plain functions so that they survive deepcopy and pickle. A compiler breaks its graph at them: a
# swap traced by half would let the base act.
@torch.compiler.disable
def put_weights(module: Any, args: tuple[Any, ...]) -> None:
    """Puts W' into the module before it runs."""
    deltas: Deltas = module.deltas
    if not deltas.stepped:
        deltas.called = True
        deltas.stepped = module.training
    refuse_other_state(deltas)
    if deltas.active:
        assert isinstance(deltas.site, LeafSite)
        deltas.swapped = deltas.site.put(deltas.site.split(changed_weight(deltas)))


@torch.compiler.disable
def take_weights(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
    """Puts the module's own W back after it ran, or failed."""
    deltas: Any = module.deltas
    if deltas.swapped:
        deltas.site.put(deltas.swapped)
        deltas.swapped = {}
    note(deltas, y)

"""Measures the share of each weight that a start leaves when the part in A and B is subtracted."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

from veneer.adapt.attached import changes
from veneer.analyse.numbers import started
from veneer.methods import Stats, inits
from veneer.methods.base.protocols import SubtractsStart
from veneer.ops.matrix.linalg import norm_without
from veneer.runs.trained import NAME
from veneer.train.loop.progress import Voice
from veneer.train.run import Run


def of_weights(run: Run) -> str | None:
    """Returns the run's start if it takes A and B out of the weights."""
    return run.init if run.init is not None and inits.needs(run.init).of_weight else None


def begun(model: nn.Module, run: Run, stats: Mapping[str, Stats] | None, voice: Voice) -> dict[str, Any]:
    """Returns, for config.json, the share of the weights that the run's start leaves, and says it."""
    init = of_weights(run)
    layers = left(model, NAME, stats) if init else {}
    if init is None or not layers:
        return {}
    found = described(init, layers)
    voice.say(started(found))
    return {"start": found}


@torch.no_grad()
def left(model: nn.Module, name: str, stats: Mapping[str, Stats] | None) -> dict[str, float]:
    """Returns ||W - s B A|| / ||W|| by layer, of the starts of adapter `name`.

    stats: of starts that compensate for quantisation to Q, for which it is ||W - Q - s B A|| / ||W||.
    """
    found = {}
    for site, delta in changes(model, name):
        known = stats[site.name].left if stats else None
        start = delta.taken() if isinstance(delta, SubtractsStart) else None
        if known is None and start is not None:
            known = norm_without(site.weight().detach(), start.B, start.A)
        if known is not None:
            found[site.name] = known
    return found


def described(init: str, layers: Mapping[str, float]) -> dict[str, Any]:
    """Returns, for config.json and results.json, the start and the share of the weights that it leaves."""
    middle = {"median": median(layers.values()), "least": min(layers.values()), "most": max(layers.values())}
    return {"init": init, "left": middle, "layers": dict(layers)}

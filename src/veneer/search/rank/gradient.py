"""The form without a training: ranks by the share of each layer in the loss's first-order change (GoRA).

He et al. 2025, https://arxiv.org/abs/2502.12171
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from veneer.methods import Stats, get
from veneer.methods.base.options import option
from veneer.models import machine
from veneer.runs import base_model
from veneer.runs.decide import decided
from veneer.runs.prepare import read
from veneer.runs.starts import calibration
from veneer.sites import Site
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run

LEAST, MOST = 0.5, 4.0  # of the mean rank


def ranks(shapes: Sequence[tuple[int, int]], importance: Sequence[float], rank: int) -> list[int]:
    """Returns a rank for every layer, by its importance, at about the parameters of a uniform `rank`.

    shapes: (out, in). A layer's share of sum_j sqrt(out_j + in_j) rank is that of its importance, and
    sqrt(out + in) of it buy one rank. Ranks lie between half of `rank` and four times it, and at most
    min(out, in).
    """
    sizes = [(out + in_) ** 0.5 for out, in_ in shapes]
    budget, total = sum(sizes) * rank, sum(importance)
    found = []
    for (out, in_), size, own in zip(shapes, sizes, importance, strict=True):
        wanted = round(budget * own / total / size) if total else rank
        least, most = max(1, int(LEAST * rank)), int(MOST * rank)
        found.append(min(max(wanted, least), most, out, in_))
    return found


@torch.no_grad()
def importance(site: Site, stats: Stats) -> float:
    """Returns the mean of |W o G|, G the gradient's leading part: the loss's first-order change by W."""
    assert stats.gradient is not None
    U, S, Vh = stats.gradient
    W: Tensor = site.weight().detach().to(U)
    return float((W * ((U * S) @ Vh)).abs().mean())


def by_gradient(run: Run, voice: Voice) -> dict[str, Any]:
    """Returns rank, rank_pattern and reason, from the gradient of examples of the training text."""
    begun = time.monotonic()
    device = machine.device(run.device)
    rated, task, held = read(decided(run, device), Notes())
    model, _ = base_model.base(rated, task, rated.base_dtype, device, Voice(False))
    rank = int(option(get(rated.method), "rank", rated.options))
    looked = replace(rated, options={**rated.options, "init": "gora"})
    stats = calibration.look(model, looked, task, held["train"].examples, voice)
    sites = [site for site in calibration.sites(model, rated) if site.name in stats]
    shares = [importance(site, stats[site.name]) for site in sites]
    chosen = ranks([(site.out, site.in_) for site in sites], shares, rank)
    return {
        "form": "gradient",
        "metric": task.METRIC._asdict(),
        "curve": {},
        "rank": rank,
        "reason": f"ranks from {min(chosen)} to {max(chosen)} by the gradient, at the size of this one",
        "rank_pattern": {site.name: r for site, r in zip(sites, chosen, strict=True)},
        "importance": {site.name: share for site, share in zip(sites, shares, strict=True)},
        "lr": run.lr,
        "training_seconds": time.monotonic() - begun,
    }

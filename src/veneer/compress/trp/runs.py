"""Trained rank pruning within a run: projections after the optimiser's steps, and the factored model."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from veneer.compress.folder import save_compressed
from veneer.compress.trp.forms import form_of
from veneer.compress.trp.trp import TRP
from veneer.data.tokenizer import Tokenizer
from veneer.sites.factored.site import factored_forms
from veneer.sites.find import find
from veneer.sites.finding.names import Target

FOLDER = "compressed"  # in the run's folder
STATE = "trp"  # in the optimiser's state, so that a checkpoint has it: steps, and shrinkage that is owed


class Wanted(Protocol):
    """Settings of a run. trp: share of the linear layers' parameters that is left, None without TRP."""

    @property
    def trp(self) -> float | None: ...
    @property
    def trp_every(self) -> int: ...
    @property
    def to(self) -> Target | None: ...
    @property
    def exclude(self) -> Target: ...


def pruning(model: nn.Module, optimiser: torch.optim.Optimizer, run: Wanted) -> TRP:
    """Returns the TRP of the run's linear layers. Raises SiteError if none gets smaller."""
    sites = find(model, run.to or "all-linear", run.exclude)
    names = [s.name for s in sites if form_of(s.module, "channel") is not None]
    return TRP(model, optimiser, budget=run.trp, every=run.trp_every, to=names or ["linear"])


def hold(model: nn.Module, optimiser: torch.optim.Optimizer, run: Wanted) -> None:
    """Makes every step of the optimiser count for TRP, if the run asks for it."""
    if run.trp is None:
        return
    trp = pruning(model, optimiser, run)
    weight = next(iter(trp.forms.values())).weight

    def after(optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        state = optimiser.state[weight]
        steps, trp.owed = state[STATE].tolist() if STATE in state else (0, 0.0)
        trp.steps = int(steps)
        trp.step()
        state[STATE] = torch.tensor([trp.steps, trp.owed], dtype=torch.float64)

    optimiser.register_step_post_hook(after)


def project(model: nn.Module, optimiser: torch.optim.Optimizer, run: Wanted) -> None:
    """Projects the weights that were trained since the last projection, if the run asks for it."""
    if run.trp is not None:
        pruning(model, optimiser, run).project()


def write(model: nn.Module, out: Path, run: Wanted, tokenizer: Tokenizer) -> None:
    """Writes the projected model with factored layers into the run's folder, if the run asks for it."""
    if run.trp is None:
        return
    small = copy.deepcopy(model)
    trp = pruning(small, torch.optim.SGD(small.parameters(), lr=0.0), run)
    small = trp.finish()
    shutil.rmtree(out / FOLDER, ignore_errors=True)  # of an end that was interrupted
    if factored_forms(small):
        record = {"method": "trp", "settings": {"trp": run.trp, "trp_every": run.trp_every}}
        save_compressed(small.eval(), out / FOLDER, tokenizer=tokenizer, record=record)

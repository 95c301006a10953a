"""The base of a run: plain, quantised as it says, or quantised around the adapter that it starts with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import methods
from veneer.compress.quantise import quantise, quantise_around
from veneer.methods import Stats, inits
from veneer.methods.base.options import option
from veneer.models import pretrained
from veneer.sites import changed
from veneer.train.folder.layout import BASE
from veneer.train.loop.progress import Voice
from veneer.train.run import Run
from veneer.units import size


def start_of(run: Run) -> str | None:
    """Returns the run's start if it compensates for quantisation: the run then has a base of its own."""
    return run.init if run.init is not None and inits.get(run.init).NEEDS == "residual" else None


def own_base(run: Run) -> Path:
    """The folder of the quantised layers of a run whose base is its own."""
    return Path(run.out) / BASE


def base(
    run: Run, dtype: torch.dtype, device: torch.device, voice: Voice, *, only_shapes: bool = False
) -> tuple[nn.Module, Mapping[str, Stats] | None]:
    """The base in eval mode, and what a start that makes up for its quantisation starts from.

    It is quantised where it was loaded, and goes to the device in few bits. Raises the errors of both.
    """
    start = start_of(run)
    if run.quantise is None:
        return pretrained.causal_lm(run.model, dtype, device), None
    model = pretrained.causal_lm(run.model, dtype, torch.device("cpu"))
    before, stats = _size(model), None
    if start is None:
        quantise(model, run.quantise)
    else:
        rank = option(methods.get(run.method), "rank", run.options)
        layers: dict[str, Any] = dict(to=run.to, exclude=run.exclude, rank_pattern=run.rank_pattern)
        times = 1 if only_shapes else 5
        stats = quantise_around(
            model, run.quantise, start=start, rank=rank, iterations=times, seed=run.seed, **layers
        )
        model.__dict__["name_or_path"] = str(own_base(run))  # what the adapter's files say that it belongs to
    voice.say(f"the base in {run.quantise}: {size(_size(model))} instead of {size(before)}")
    return model.to(device), stats


def base_again(run: Run, out: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The base that the run in folder `out` had: its own where it kept one. Raises what reading it raises."""
    if changed.kind_of_folder(out / BASE) is not None:
        return pretrained.causal_lm(str(out / BASE), dtype, device)
    return pretrained.causal_lm(run.model, dtype, device, run.quantise)


def _size(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())

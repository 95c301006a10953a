"""Loads the base of a run: plain, quantised, or quantised around the start of its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import methods
from veneer.adapt.tokens.add import resize_vocabulary
from veneer.compress.quantise import quantise, quantise_around
from veneer.errors import ConfigError
from veneer.errors import option as option_of
from veneer.methods import Stats, inits
from veneer.methods.base.options import option
from veneer.models.from_disk import from_disk
from veneer.models.of_task import for_task
from veneer.models.on_disk import shelf_of
from veneer.models.pretrained import LANGUAGE_MODEL
from veneer.sites import changed
from veneer.tasks import Task
from veneer.train.folder.layout import BASE
from veneer.train.loop.progress import Voice
from veneer.train.run import Run
from veneer.units import size


def start_of(run: Run) -> str | None:
    """Returns the run's start if it compensates for quantisation: the run then has a base of its own."""
    return run.init if run.init is not None and inits.needs(run.init).residual else None


def own_base(run: Run) -> Path:
    """Returns the folder of the quantised layers of a run with its own base."""
    return Path(run.out) / BASE


def base(
    run: Run, task: Task, dtype: torch.dtype, device: torch.device, voice: Voice, *, only_shapes: bool = False
) -> tuple[nn.Module, Mapping[str, Stats] | None]:
    """Returns the base in eval mode, and the statistics of a start that compensates for its quantisation.

    It is quantised where it was loaded, and moves to the device in few bits. Raises the errors of both.
    """
    start = start_of(run)
    if run.stream_base:
        return _on_disk(run, task, dtype, device, voice), None
    if run.quantise is None:
        return _grown(for_task(run.model, task, dtype, device), run, task), None
    model = _grown(for_task(run.model, task, dtype, torch.device("cpu")), run, task)
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
        model.__dict__["name_or_path"] = str(own_base(run))  # recorded by the adapter's files
    voice.say(f"the base in {run.quantise}: {size(_size(model))} instead of {size(before)}")
    return model.to(device), stats


def _on_disk(run: Run, task: Task, dtype: torch.dtype, device: torch.device, voice: Voice) -> nn.Module:
    """Returns the base with its blocks on disk. Raises ConfigError, FormatError."""
    if task.AUTO != LANGUAGE_MODEL:
        raise ConfigError(
            f"{option_of('stream_base')} reads causal language models block by block, got task {run.task!r};"
            " leave it out"
        )
    model = _grown(from_disk(run.model, dtype, device, run.quantise, near=Path(run.out)), run, task)
    held = shelf_of(model)
    assert held is not None
    voice.say(
        f"the base stays on disk: {size(_size(model))}, of which one block of {size(held.block_bytes)} is in"
        " memory at a time"
    )
    return model


def base_again(run: Run, task: Task, out: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Returns the base of the run in folder `out`, its own if it has one. Raises the errors of loading."""
    if changed.kind_of_folder(out / BASE) is not None:
        return _grown(for_task(str(out / BASE), task, dtype, device), run, task)
    return _grown(for_task(run.model, task, dtype, device, run.quantise), run, task)


def added(run: Run, task: Task) -> dict[str, int]:
    """Returns the ids of the run's new tokens, which the task's tokenizer holds."""
    known = task.processor.get_vocab() if run.add_tokens else {}
    return {t: int(known[t]) for t in run.add_tokens}


def _grown(model: nn.Module, run: Run, task: Task) -> nn.Module:
    """Returns the model with room for the run's new tokens."""
    ids = added(run, task).values()
    return resize_vocabulary(model, max(ids) + 1) if ids else model


def _size(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())

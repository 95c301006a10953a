"""Compares what a training needs with the memory that is available."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from veneer import tasks
from veneer.adapt.attached import base_parameters
from veneer.analyse.cost import process_memory
from veneer.analyse.cost.simulate import Memory
from veneer.errors import ConfigError, VeneerError
from veneer.models import pretrained
from veneer.models.on_disk import shelf_of
from veneer.models.pretrained import LANGUAGE_MODEL
from veneer.sites.blocks import blocks
from veneer.train.run import Run
from veneer.units import size


class NoRoom(VeneerError):
    """Raised where the model alone is larger than the available memory."""

    exit_code = 3


def fitting(run: Run, device: torch.device, say: Callable[[str], None]) -> Run:
    """Returns the run, with `stream_base` if its base alone exceeds the available memory; loads nothing.

    Raises NoRoom if that does not help either, or cannot go with the other settings.
    """
    n, room = n_parameters(run), process_memory.available(device)
    narrow = not run.trains_base and run.precision_on(device) == "bf16"
    width = 2 if narrow else 4
    if run.stream_base or n is None or room is None or n * width <= room:
        return run
    base = f"model {run.model!r} has {n:,} parameters, {size(n * width)} in {8 * width} bits, and"
    held = _with_one_block(run)
    if held is not None and held * width <= room:
        say(
            f"{base} {size(room)} of memory are available on {device}: planned with"
            f" --stream-base, which holds {size(held * width)} of them at a time"
        )
        return replace(run, stream_base=True)
    other = "" if narrow or run.trains_base else ", or --precision bf16"
    raise NoRoom(
        f"{base} {size(room)} of memory are available on {device}; free memory, use a smaller model{other}"
    )


def _with_one_block(run: Run) -> int | None:
    """Returns the parameters in memory while one block is, or None for a run that needs the whole base."""
    if not Path(pretrained.source(run.model)).is_dir() or tasks.get(run.task).AUTO != LANGUAGE_MODEL:
        return None
    try:
        replace(run, stream_base=True)
    except ConfigError:
        return None
    skeleton = pretrained.skeleton(run.model)
    every = [sum(p.numel() for p in block.parameters()) for block in blocks(skeleton)]
    return sum(p.numel() for p in skeleton.parameters()) - sum(every) + max(every) if every else None


def in_memory(model: nn.Module, memory: Memory) -> Memory:
    """Returns the memory of a step without the blocks that are on disk meanwhile, all but one."""
    shelf = shelf_of(model)
    if shelf is None:
        return memory
    total = sum(t.nbytes for t in [*base_parameters(model).values(), *model.buffers()])
    away = round(memory.weights * (shelf.bytes - shelf.block_bytes) / total)
    return memory._replace(weights=memory.weights - away, peak=memory.peak - away)


def n_parameters(run: Run) -> int | None:
    """Returns a model's parameters by its configuration alone, tied ones once; None where that is unknown."""
    try:
        skeleton = pretrained.skeleton(run.model, tasks.get(run.task).AUTO)
        return sum(p.numel() for p in skeleton.parameters())
    except ConfigError:  # loading the model says more
        return None


def problem(growth: int, room: int | None, device: torch.device) -> str | None:
    """Returns why the training will not fit, or None if it will or the available memory is unknown."""
    if room is None or growth <= room:
        return None
    return (
        f"will not fit: a step takes about {size(growth)} on top of the loaded model, and {size(room)} are"
        f" available on {device}; see which setting would halve it"
    )

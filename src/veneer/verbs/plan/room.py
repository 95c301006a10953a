"""Compares what a training needs with the memory that is available."""

from __future__ import annotations

import torch

from veneer import tasks
from veneer.analyse.cost import process_memory
from veneer.errors import ConfigError, VeneerError
from veneer.models import pretrained
from veneer.train.run import Run
from veneer.units import size


class NoRoom(VeneerError):
    """Raised where the model alone is larger than the available memory."""

    exit_code = 3


def check_weights(run: Run, device: torch.device) -> None:
    """Raises NoRoom if the model's weights alone exceed the available memory; loads nothing to find out."""
    n, room = n_parameters(run), process_memory.available(device)
    narrow = not run.trains_base and run.precision_on(device) == "bf16"
    width = 2 if narrow else 4
    if n is not None and room is not None and n * width > room:
        other = "" if narrow or run.trains_base else ", or --precision bf16"
        raise NoRoom(
            f"model {run.model!r} has {n:,} parameters, {size(n * width)} in {8 * width} bits, and"
            f" {size(room)} of memory are available on {device}; free memory, use a smaller model{other}"
        )


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

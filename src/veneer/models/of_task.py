"""Loads a base model the way a task needs it: its class, its head, its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.errors import ConfigError, option
from veneer.models import pretrained
from veneer.models.from_disk import from_disk
from veneer.tasks import Task


def for_task(
    name: str, task: Task, dtype: torch.dtype, device: torch.device, quantised: str | None = None
) -> nn.Module:
    """Returns the model as the task loads it. Raises ConfigError."""
    own: dict[str, Any] = {"options": task.model_options(), "new_head": task.NEW_HEAD}
    return pretrained.model(name, task.AUTO, dtype, device, quantised, **own)


def loaded_base(
    name: str,
    task: Task | None,
    dtype: torch.dtype,
    device: torch.device,
    quantised: str | None = None,
    *,
    stream: bool = False,
) -> nn.Module:
    """Returns the model as the task loads it, a causal language model without a task.

    stream: leaves its blocks on disk, and packs them beside the working folder if they are quantised. Raises
    ConfigError for a base that cannot be read block by block.
    """
    if stream:
        if task is not None and task.AUTO != pretrained.LANGUAGE_MODEL:
            raise ConfigError(
                f"{option('stream_base')} reads causal language models block by block; leave it out for this"
                " task"
            )
        return from_disk(name, dtype, device, quantised)
    if task is None:
        return pretrained.causal_lm(name, dtype, device, quantised)
    return for_task(name, task, dtype, device, quantised)

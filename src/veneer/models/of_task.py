"""Loads a base model the way a task needs it: its class, its head, its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer.models import pretrained
from veneer.tasks import Task


def for_task(
    name: str, task: Task, dtype: torch.dtype, device: torch.device, quantised: str | None = None
) -> nn.Module:
    """Returns the model as the task loads it. Raises ConfigError."""
    own: dict[str, Any] = {"options": task.model_options(), "new_head": task.NEW_HEAD}
    return pretrained.model(name, task.AUTO, dtype, device, quantised, **own)

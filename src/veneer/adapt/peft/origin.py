"""Names a model's source, its task and the heads of that task, as PEFT does."""

from __future__ import annotations

from torch import nn

from veneer.adapt.peft.settings import HEADS, TASKS
from veneer.adapt.peft.targets import Config
from veneer.sites.own import base_modules


def origin(model: nn.Module, saved: list[str]) -> Config:
    """Returns the base's source and PEFT's task type.

    The task is None unless all heads that PEFT trains with it are saved.
    """
    kind = type(model)
    task = _task(model) if set(heads(model)) <= set(saved) else None
    return {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": task,
        "auto_mapping": None
        if task
        else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
    }


def heads(model: nn.Module) -> list[str]:
    """Returns the modules that PEFT trains with every adapter of the model's task, such as "classifier"."""
    task = _task(model)
    return [n for n in base_modules(model) if task in HEADS and n.endswith(HEADS[task])]


def _task(model: nn.Module) -> str | None:
    kind, known = type(model), getattr(getattr(model, "config", None), "model_type", None)
    if not known or getattr(kind, "main_input_name", "input_ids") != "input_ids":
        return None  # PEFT's classes for tasks pass token ids by name, which Whisper's forward lacks
    return next((t for end, t in TASKS.items() if kind.__name__.endswith(end)), None)

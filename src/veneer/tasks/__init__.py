"""Tasks, one file each: the file's name, with dashes, is the task's name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from veneer.data.reading import Reading
from veneer.registry import Registry
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Objective, Say, Task

__all__ = [
    "DEFAULT",
    "Batch",
    "Figure",
    "Metric",
    "Objective",
    "Say",
    "Task",
    "available",
    "build",
    "get",
    "options_of",
]

TASKS = Registry(__name__, "task", apart=("base", "senses", "measures", "text", "preference"), dashes=True)
DEFAULT = "causal-lm"


def available() -> list[str]:
    """Returns the names of all tasks."""
    return TASKS.names()


def get(name: str) -> type[Task]:
    """Returns the task called `name`. Raises ConfigError with the nearest name for an unknown one."""
    return TASKS.own_class(name, Task)  # type: ignore[type-abstract]


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Returns a task's options with their types and defaults."""
    parameters = inspect.signature(get(name).__init__, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def build(name: str, processor: Any, reading: Reading, options: Mapping[str, Any] | None = None) -> Task:
    """Returns the task `name` with its processor, its way of reading and its options."""
    return get(name)(processor, reading, **(options or {}))

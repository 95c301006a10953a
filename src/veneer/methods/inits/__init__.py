"""Starts of a low-rank pair: one file, one function `start`; the file's name is the start's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.errors import ConfigError, suggest


class Start(NamedTuple):
    """What a start may look at: W (out, in), the rank, the scaling s, its own draw, and whether x holds token ids."""

    W: Tensor
    rank: int
    scaling: float
    draw: torch.Generator
    lookup: bool = False


Init = Callable[[Start], tuple[Tensor, Tensor]]  # -> A (r, in), B (out, r)


def available() -> list[str]:
    """Names of all starts."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The module of a start: `start`, and `ALPHA`, the default alpha in ranks. Raises ConfigError for an unknown one."""
    if name not in available():
        raise ConfigError(f"unknown init {name!r}{suggest(name, available())}")
    return importlib.import_module(f"{__name__}.{name}")

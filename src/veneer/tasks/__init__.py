"""One objective, one file; the file's name is the objective's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from veneer.errors import ConfigError, suggest

Batch = Mapping[str, Tensor]
Objective = Callable[[nn.Module, Batch], tuple[Tensor, int]]  # -> sum of the losses in nats, number of labels


def available() -> list[str]:
    """Names of all objectives."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get(name: str) -> Objective:
    """The function `loss` of an objective's file. Raises ConfigError for an unknown one."""
    if name not in available():
        raise ConfigError(f"unknown objective {name!r}{suggest(name, available())}")
    found: Objective = importlib.import_module(f"{__name__}.{name}").loss
    return found

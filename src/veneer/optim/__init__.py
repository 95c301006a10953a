"""Parameter groups and optimisers that work by roles on any method."""

from __future__ import annotations

from collections.abc import Callable

from veneer.errors import ConfigError, suggest
from veneer.optim import loraplus

# An optimiser's name -> the rates of roles in multiples of the run's rate, given the ratio of LoRA+.
SCALES: dict[str, Callable[[float], dict[str, float]]] = {"adamw": lambda ratio: {}, "loraplus": loraplus.scales}


def scales(name: str, ratio: float) -> dict[str, float]:
    """Multiples of the run's rate by role; a role that is not named has 1. Raises ConfigError for an unknown optimiser."""
    if name not in SCALES:
        raise ConfigError(f"unknown optimiser {name!r}{suggest(name, SCALES)}")
    return SCALES[name](ratio)

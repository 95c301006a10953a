"""Optimisers that work by roles on any method: one file each, named after the optimiser."""

from __future__ import annotations

import inspect
from typing import Any

from veneer.errors import ConfigError, not_finite, suggest
from veneer.optim.base.optimiser import Optimiser, Trained
from veneer.registry import Registry

__all__ = ["Optimiser", "Trained", "available", "get", "make", "options_of"]

OPTIMISERS = Registry(__name__, "optimiser", apart=("base",), dashes=True)


def available() -> list[str]:
    """Returns the names of all optimisers."""
    return OPTIMISERS.names()


def get(name: str) -> type[Optimiser]:
    """Returns the class of optimiser `name`. Raises ConfigError, with the nearest name, if unknown."""
    return OPTIMISERS.own_class(name, Optimiser)  # type: ignore[type-abstract]


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """Returns the optimiser's options with types and defaults."""
    parameters = inspect.signature(get(name).__init__, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def make(name: str, **options: Any) -> Optimiser:
    """Returns the optimiser with these options. Raises ConfigError for unknown names and bad values."""
    known = options_of(name)
    problems = [
        f"optimiser {name!r} has no option {o!r}{suggest(o, known)}" for o in options if o not in known
    ]
    problems += not_finite(options)
    if problems:
        raise ConfigError("\n".join(problems))
    return get(name)(**options)

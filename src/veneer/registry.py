"""Choices that are files: a folder of methods, starts, optimisers, objectives or trackers, each known by its file's name."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

from veneer.errors import ConfigError, suggest

T = TypeVar("T")


@dataclass(frozen=True)
class Registry:
    """What the package `folder` offers. kind: what messages call a choice; apart: its files that are none; dashes: names have
    dashes where files have underscores."""

    folder: str
    kind: str
    apart: tuple[str, ...] = ()
    dashes: bool = False

    def names(self) -> list[str]:
        """All choices, sorted."""
        files = sorted(
            m.name
            for m in pkgutil.iter_modules(importlib.import_module(self.folder).__path__)
            if m.name not in self.apart
        )
        return [f.replace("_", "-") for f in files] if self.dashes else files

    def module(self, name: str) -> ModuleType:
        """The file of that name. Raises ConfigError with the nearest name for an unknown one."""
        if name not in self.names():
            raise ConfigError(f"unknown {self.kind} {name!r}{suggest(name, self.names())}")
        return importlib.import_module(f"{self.folder}.{name.replace('-', '_') if self.dashes else name}")

    def own_class(self, name: str, base: type[T]) -> type[T]:
        """The first subclass of `base` that the file of that name defines. Raises ConfigError for an unknown name."""
        module = self.module(name)
        return next(
            c
            for c in vars(module).values()
            if isinstance(c, type) and issubclass(c, base) and c.__module__ == module.__name__
        )

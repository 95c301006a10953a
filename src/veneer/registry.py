"""Finds choices that are files: methods, starts, optimisers, objectives, trackers, known by file name."""

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
    """The choices that the package `folder` offers.

    kind: the word for a choice in messages. apart: files in the folder that are not choices. dashes: names
    have dashes where files have underscores.
    """

    folder: str
    kind: str
    apart: tuple[str, ...] = ()
    dashes: bool = False

    def names(self) -> list[str]:
        """Returns all choices, sorted."""
        files = sorted(
            m.name
            for m in pkgutil.iter_modules(importlib.import_module(self.folder).__path__)
            if m.name not in self.apart
        )
        return [f.replace("_", "-") for f in files] if self.dashes else files

    def module(self, name: str) -> ModuleType:
        """Imports the file of that name. Raises ConfigError with the nearest name for an unknown one."""
        if name not in self.names():
            raise ConfigError(f"unknown {self.kind} {name!r}{suggest(name, self.names())}")
        return importlib.import_module(f"{self.folder}.{name.replace('-', '_') if self.dashes else name}")

    def own_class(self, name: str, base: type[T]) -> type[T]:
        """Returns the first subclass of `base` in the file of that name. Raises ConfigError for an unknown
        one.
        """
        module = self.module(name)
        return next(
            c
            for c in vars(module).values()
            if isinstance(c, type) and issubclass(c, base) and c.__module__ == module.__name__
        )

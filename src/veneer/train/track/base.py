"""Defines a tracker: a library that receives a run's start, its figures per step, and its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from veneer.errors import ConfigError
from veneer.registry import Registry

TRACKERS = Registry("veneer.train.track", "tracker", apart=("base", "feed"))


class Tracker(ABC):
    """One run as one library shows it.

    Its methods may raise whatever the library raises: `Feed` sees to it.
    """

    packages: ClassVar[tuple[str, ...]]  # modules that must be installed

    @abstractmethod
    def start(self, folder: Path, config: Mapping[str, Any], *, step: int, known: str | None) -> str | None:
        """Begins, or goes on, before the figures after `step` come: what the library calls the run, to be
        kept for a resume.

        folder: of the run; config: its config.json; known: what an earlier start of the same run returned.
        """

    @abstractmethod
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step by name; a step may come twice, with other names."""

    @abstractmethod
    def finish(self, results: Mapping[str, Any] | None) -> None:
        """Ends. results: results.json, or None for a run that was stopped and may go on."""


def available() -> list[str]:
    """Names of all trackers."""
    return TRACKERS.names()


def get(name: str) -> type[Tracker]:
    """The tracker called `name`. Raises ConfigError with the nearest name for an unknown one."""
    return TRACKERS.own_class(name, Tracker)  # type: ignore[type-abstract]


def check_installed(names: Iterable[str]) -> None:
    """Raises ConfigError that names the extra of every tracker whose library is not installed."""
    missing = {n: [p for p in get(n).packages if find_spec(p) is None] for n in names}
    lines = [
        f"track: {n} needs the package {', '.join(p)}: pip install 'veneer[{n}]'"
        for n, p in missing.items()
        if p
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def title(folder: Path) -> str:
    """Returns the name of the run: its folder's name."""
    return folder.resolve().name


def flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested tables by dotted name, such as ("learned.after", 1.3)."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers, by their flat names."""
    return {n: float(v) for n, v in flat(content) if isinstance(v, int | float) and not isinstance(v, bool)}

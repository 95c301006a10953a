"""Settings of another program, taken one by one; untaken ones are listed, never dropped silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from veneer.errors import suggest

NOTHING: tuple[Any, ...] = (None, "", [], {}, ())
UNSUPPORTED = "not supported by Veneer"


class Uncarried(NamedTuple):
    """A setting without a counterpart in Veneer, and the reason."""

    key: str
    value: Any
    why: str


@dataclass
class Translation:
    """A translated configuration.

    settings: Veneer's, by name. uncarried: settings without a counterpart. notes: differences in meaning.
    """

    tool: str
    settings: dict[str, Any] = field(default_factory=dict)
    uncarried: list[Uncarried] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Given:
    """The settings of a file. Keys with dots reach into tables: "lora_parameters.rank".

    defaults: the other program's values for settings that the file does not set.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.values, self.defaults = dict(_leaves(values)), defaults
        self.taken: set[str] = set()
        self.left: list[Uncarried] = []

    def take(self, key: str) -> Any:
        """Returns the value in the file, else the program's default, else None."""
        self.taken.add(key)
        value = self.values.get(key)
        return self.defaults.get(key) if value in NOTHING else value

    def leave(self, key: str, why: str, harmless: tuple[Any, ...] = ()) -> None:
        """Records a setting without a counterpart and the reason; values in `harmless` need none."""
        value = self.take(key)
        if value not in NOTHING and value not in harmless:
            self.left.append(Uncarried(key, value, why))

    def has(self, key: str) -> bool:
        """Returns True if the file itself sets the key."""
        return self.values.get(key) not in NOTHING

    def uncarried(self) -> list[Uncarried]:
        """Returns the settings without a counterpart, those that nobody took included."""
        rest = {k: v for k, v in self.values.items() if k not in self.taken and v not in NOTHING}
        return [*self.left, *(Uncarried(k, v, f"unknown setting{self._typo(k)}") for k, v in rest.items())]

    def _typo(self, key: str) -> str:
        """Returns a hint if the key resembles a setting that the file lacks: programs often ignore typos."""
        hint = suggest(key, (k for k in self.taken if k not in self.values))
        return hint if hint.startswith("; did") else ""


def _leaves(values: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value); lists stay unsplit."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{lead}{key}.")
        else:
            yield f"{lead}{key}", value


def without_nothing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that have a value."""
    return {k: v for k, v in settings.items() if v not in NOTHING}

"""Another program's settings, taken one by one: what nobody took is listed, never dropped silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from veneer.errors import suggest

NOTHING: tuple[Any, ...] = (None, "", [], {}, ())


class Uncarried(NamedTuple):
    """A setting that has no counterpart here, and why."""

    key: str
    value: Any
    why: str


@dataclass
class Translation:
    """settings: of our Run, by name. uncarried: what could not be carried. notes: what means something a little else here."""

    tool: str
    settings: dict[str, Any] = field(default_factory=dict)
    uncarried: list[Uncarried] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Given:
    """The settings of a file. Keys with dots reach into tables: "lora_parameters.rank".

    defaults: what the other program does where the file is silent.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.values, self.defaults = dict(_leaves(values)), defaults
        self.taken: set[str] = set()
        self.left: list[Uncarried] = []

    def take(self, key: str) -> Any:
        """The value in the file, or the program's default; None where there is neither."""
        self.taken.add(key)
        value = self.values.get(key)
        return self.defaults.get(key) if value in NOTHING else value

    def leave(self, key: str, why: str, harmless: tuple[Any, ...] = ()) -> None:
        """The setting is not carried, for the reason `why`; the values `harmless` say what is done here anyway."""
        value = self.take(key)
        if value not in NOTHING and value not in harmless:
            self.left.append(Uncarried(key, value, why))

    def has(self, key: str) -> bool:
        """Whether the file itself sets the key."""
        return self.values.get(key) not in NOTHING

    def uncarried(self) -> list[Uncarried]:
        """All that was left, and all that nobody took."""
        rest = {k: v for k, v in self.values.items() if k not in self.taken and v not in NOTHING}
        return [*self.left, *(Uncarried(k, v, f"not known here{self._typo(k)}") for k, v in rest.items())]

    def _typo(self, key: str) -> str:
        """A question where the file lacks a setting of nearly this name: most programs drop such a one silently."""
        hint = suggest(key, (k for k in self.taken if k not in self.values))
        return hint if hint.startswith("; did") else ""


def _leaves(values: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value); lists stay whole."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{lead}{key}.")
        else:
            yield f"{lead}{key}", value


def without_nothing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have a value."""
    return {k: v for k, v in settings.items() if v not in NOTHING}

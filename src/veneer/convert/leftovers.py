"""What a reader did not understand: an error that names all of it, unless the user lets it be left out by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from veneer.errors import FormatError, first_few


class Leftovers:
    """Collects tensors and settings that no pair holds; `allow` are names, with * for any text, that may be left out."""

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self.allow = (allow,) if isinstance(allow, str) else tuple(allow)
        self.left_out: list[str] = []
        self.refused: dict[str, list[str]] = {}

    def add(self, name: str, why: str) -> None:
        """`name` is not carried, for the reason `why`."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.allow):
            self.left_out.append(name)
        else:
            self.refused.setdefault(why, []).append(name)

    def settle(self, where: object) -> tuple[str, ...]:
        """What was left out by permission. Raises FormatError for the rest."""
        if self.refused:
            lines = [f"- {why}: {first_few(names)}" for why, names in self.refused.items()]
            hint = "to leave something out, name it: allow=('..',), with * for any text"
            raise FormatError("\n".join([f"{where} holds what cannot be carried:", *lines, hint]))
        return tuple(self.left_out)

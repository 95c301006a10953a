"""Collects tensors and settings that a reader does not support; one error names them all."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from veneer.errors import FormatError, first_few, option


class Leftovers:
    """Tensors and settings that cannot be expressed as pairs.

    allow: names that may be dropped; * matches any text.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self.allow = (allow,) if isinstance(allow, str) else tuple(allow)
        self.left_out: list[str] = []
        self.refused: dict[str, list[str]] = {}

    def add(self, name: str, why: str) -> None:
        """Records that `name` is dropped or refused, for the reason `why`."""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.allow):
            self.left_out.append(name)
        else:
            self.refused.setdefault(why, []).append(name)

    def settle(self, where: object) -> tuple[str, ...]:
        """Returns the names dropped by permission. Raises FormatError for the rest."""
        if self.refused:
            lines = [f"- {why}: {first_few(names)}" for why, names in self.refused.items()]
            hint = f"to drop entries, name them: {option('allow', ('..',))}; * matches any text"
            raise FormatError("\n".join([f"{where} holds entries that cannot be converted:", *lines, hint]))
        return tuple(self.left_out)

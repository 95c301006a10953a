"""Keeps the outcomes of a round over all faults, which may run in parts and go on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mutants.faults import Fault
from mutants.pool import Outcome

Key = tuple[str, ...]


class Journal:
    """A file of one outcome a line, by the text of the fault: a fault of a changed line is tried again."""

    def __init__(self, path: Path) -> None:
        """Reads the outcomes so far; a last line that was cut off is left out."""
        self.path, self.how = path, dict[Key, str]()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
                self.how[tuple(entry["fault"])] = entry["how"]
            except (json.JSONDecodeError, KeyError):
                continue

    def add(self, outcome: Outcome) -> None:
        """Writes an outcome down at once."""
        self.how[outcome.fault.key] = outcome.how
        entry = {"fault": outcome.fault.key, "how": outcome.how, "test": outcome.test}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")

    def left(self, found: Iterable[Fault], aside: Iterable[Key]) -> list[Fault]:
        """Returns the faults without an outcome, one of each text, in their order."""
        known = {*self.how, *aside}
        return [fault for key, fault in {f.key: f for f in found}.items() if key not in known]

    def survivors(self, found: Iterable[Fault], aside: Iterable[Key]) -> list[Fault]:
        """Returns the faults of the present sources that no test noticed, without those set aside since."""
        known = {f.key: f for f in found}
        out = set(aside)
        return [known[k] for k, how in self.how.items() if how == "survived" and k in known and k not in out]

    def share(self, found: Iterable[Fault], aside: Iterable[Key]) -> tuple[int, float]:
        """Returns the number of tried faults of the present sources, and the share that was noticed."""
        every = list(found)
        tried = {f.key for f in every} & (self.how.keys() - set(aside))
        missed = len(self.survivors(every, aside))
        return len(tried), 1 - missed / len(tried) if tried else 1.0

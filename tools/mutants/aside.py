"""Faults that no test can notice, with reasons; aside.json identifies them by text, so lines may move."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mutants.faults import Fault

LIST = Path(__file__).with_name("aside.json")
# equivalent: the behaviour is the same; unreachable: visible only with a GPU or on another operating system.
KINDS = ("equivalent", "unreachable")

Reasons = Mapping[tuple[str, ...], tuple[str, str]]


def load(path: Path = LIST) -> dict[tuple[str, ...], tuple[str, str]]:
    """Returns {key of a fault: (kind, reason)}. Raises ValueError for an unknown kind or an empty reason."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    for e in entries:
        if e["kind"] not in KINDS or not e["reason"]:
            raise ValueError(
                f"{path.name}: {e['file']}: {e['becomes']!r} needs a reason and a kind, one of"
                f" {', '.join(KINDS)}"
            )
    return {
        (e["file"], e["where"], e["operator"], e["was"], e["becomes"]): (e["kind"], e["reason"])
        for e in entries
    }


def idle(reasons: Reasons, faults: Iterable[Fault]) -> list[str]:
    """Returns a line for every entry that matches no fault of the sources."""
    known = {f.key for f in faults}
    return [
        f"{file}: {operator} in {where}: {was}"
        for file, where, operator, was, _ in (k for k in reasons if k not in known)
    ]

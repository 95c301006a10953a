"""Faults that no test can notice, each with its reason: aside.json names them by their text, so that lines may move."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mutants.faults import Fault

LIST = Path(__file__).with_name("aside.json")
# equivalent: the program does the same; unreachable: only a machine with a GPU, or another system, would see it.
KINDS = ("equivalent", "unreachable")

Reasons = Mapping[tuple[str, ...], tuple[str, str]]


def load(path: Path = LIST) -> dict[tuple[str, ...], tuple[str, str]]:
    """(kind, reason) by the fault's key. Raises ValueError for an entry without a reason or of no known kind."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    for e in entries:
        if e["kind"] not in KINDS or not e["reason"]:
            raise ValueError(
                f"{path.name}: {e['file']}: {e['becomes']!r} needs a reason and a kind, one of {', '.join(KINDS)}"
            )
    return {
        (e["file"], e["where"], e["operator"], e["was"], e["becomes"]): (e["kind"], e["reason"])
        for e in entries
    }


def idle(reasons: Reasons, faults: Iterable[Fault]) -> list[str]:
    """A line for every entry that is no fault of the sources any more."""
    known = {f.key for f in faults}
    return [
        f"{file}: {operator} in {where}: {was}"
        for file, where, operator, was, _ in (k for k in reasons if k not in known)
    ]

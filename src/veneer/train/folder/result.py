"""What a finished run leaves behind for people and programs: results.json, and the same as an object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from veneer.files import read_json
from veneer.train.folder import layout as run_folder
from veneer.train.loop.state import Position

NEEDED = ("before", "after", "learned", "forgotten")  # of results.json, by whoever reads it


class Change(NamedTuple):
    """Bits per byte of a text before and after the training; less is better."""

    before: float
    after: float


@dataclass(frozen=True)
class Result:
    """A finished run. metrics: results.json; learned: on test text, or on valid text without one; forgotten: on known text."""

    folder: Path
    metrics: dict[str, Any]
    learned: Change
    forgotten: Change | None

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return self.folder / run_folder.ADAPTER

    @classmethod
    def read(cls, folder: Path) -> Result:
        """The result of a finished run from its folder. Raises FormatError."""
        metrics = read_json(folder / run_folder.RESULTS, NEEDED)
        forgotten = metrics["forgotten"]
        learned = Change(metrics["learned"]["before"], metrics["learned"]["after"])
        return cls(
            folder, metrics, learned, Change(forgotten["before"], forgotten["after"]) if forgotten else None
        )


def figures(position: Position, after: dict[str, float]) -> dict[str, Any]:
    """before, after, learned and forgotten for results.json; after: bits per byte by text, at the best step."""
    before, reported = position.before, "test" if "test" in after else "valid"
    pair = {name: {"before": before[name], "after": after[name]} for name in after}
    return {
        "before": before,
        "after": after,
        "learned": {"text": reported, **pair[reported]},
        "forgotten": pair.get("known"),
    }

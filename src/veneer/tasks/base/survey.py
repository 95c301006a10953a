"""Counts and problems of rows, found without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Survey:
    """parts: figures by part of the run; epoch: of one pass over the training text; wrong: reasons not to
    train.

    notes: further remarks.
    """

    parts: dict[str, dict[str, Any]]
    epoch: dict[str, Any]
    wrong: list[str]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON."""
        return dict(vars(self))

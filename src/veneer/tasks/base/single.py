"""A joiner that joins nothing."""

from __future__ import annotations

from typing import Any


class Single:
    """Joins nothing: every piece is an example."""

    def __init__(self) -> None:
        self.open: list[Any] = []

    def add(self, piece: Any) -> Any:
        """Returns the piece."""
        return piece

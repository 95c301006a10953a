"""Keeps notes of forward passes, to compare them with their recomputation in the backward pass."""

from __future__ import annotations

from typing import Any


class Passes:
    """Notes of one layer's forward passes since the last backward; see recomputation.py."""

    __slots__ = ("bare", "graded", "mismatch", "recomputed")

    def __init__(self) -> None:
        self.bare: list[tuple[Any, ...]] = []  # states of passes without gradients
        self.graded = False  # a pass with gradients was made
        self.recomputed: int | None = None  # the backward pass that last recomputed the layer
        self.mismatch: int | None = None  # the backward pass that met an output of another state

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()  # copies and pickles begin anew

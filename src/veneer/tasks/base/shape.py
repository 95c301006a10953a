"""Sizes of a step's batches, enough to simulate the step without numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

Counted = Callable[[float], AbstractContextManager[None]]


class Shape(NamedTuple):
    """Sizes of a step's batches.

    rows: examples in one pass; tokens: size of each; labels: of the pass; passes: of the step; packed: True
    if a row holds several texts, which takes a mask (rows, 1, tokens, tokens).
    """

    rows: int
    tokens: int
    labels: int
    passes: int = 1
    packed: bool = False

"""Answers a lack of memory: fewer examples in a pass and more passes a step, with the same gradient."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from veneer.errors import VeneerError, option

CPU = "can't allocate memory"  # of PyTorch's allocator


class NoRoom(VeneerError):
    """One example alone does not fit the memory."""


def is_lack(e: RuntimeError) -> bool:
    """Tells if an error is a lack of memory, of a GPU or of the machine."""
    return isinstance(e, torch.OutOfMemoryError) or CPU in str(e)


class Room:
    """The most examples of a pass that fit the memory; None until it was short. say: takes sentences."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.rows: int | None = None

    def cut(self, micro: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
        """Returns the micro-batches in passes that fit."""
        n = self.rows
        if n is None:
            return list(micro)
        return [some[at : at + n] for some in micro for at in range(0, len(some), n)]

    def halve(self, micro: Sequence[Sequence[Any]], e: RuntimeError) -> list[Sequence[Any]]:
        """Returns the micro-batches in passes of half the examples. Raises NoRoom for passes of one."""
        rows = max(map(len, micro))
        if rows == 1:
            raise NoRoom(
                f"one example does not fit the memory ({str(e).splitlines()[0]}); lower {option('length')},"
                f" or set {option('gradient_checkpointing', True)}"
            ) from e
        self.rows = rows // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.say(
            f"out of memory with {rows} examples in a pass; goes on with {self.rows}, in more passes a step:"
            " the gradient stays the same"
        )
        return self.cut(micro)

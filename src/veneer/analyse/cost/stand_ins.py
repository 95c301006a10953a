"""Puts tensors without content in the place of a model's own, and takes them out again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class StandIns:
    """Stands tensors made by `make` in for parameters and buffers; tied ones get the same stand-in."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._made: dict[int, Tensor] = {}
        self._done: set[int] = set()  # modules whose tensors are out
        self._undo: list[tuple[dict[str, Any], str, Tensor]] = []

    def put(self, root: nn.Module, without: Collection[nn.Module] = ()) -> list[Tensor]:
        """Replaces all tensors of the module and its children but `without`, and returns the stand-ins.

        Skips modules whose tensors are replaced already.
        """
        found: list[Tensor] = []
        for module in _modules(root, {*self._done, *map(id, without)}):
            self._done.add(id(module))
            owned: Any
            for owned in (module._parameters, module._buffers):
                for name, t in owned.items():
                    if t is not None:
                        self._undo.append((owned, name, t))
                        fake = self._stand_in(t)
                        owned[name] = fake
                        found.append(fake)
        return found

    def take_out(self) -> None:
        """Puts the model's own tensors back."""
        while self._undo:
            owned, name, t = self._undo.pop()
            owned[name] = t
        self._done.clear()

    def _stand_in(self, t: Tensor) -> Tensor:
        if id(t) not in self._made:
            self._made[id(t)] = self._make(t)
        return self._made[id(t)]


def _modules(root: nn.Module, without: Collection[int]) -> Iterator[nn.Module]:
    if id(root) not in without:
        yield root
        for child in root.children():
            yield from _modules(child, without)


@contextmanager
def stand_ins(make: Callable[[Tensor], Tensor]) -> Iterator[StandIns]:
    """Yields StandIns whose tensors are out again after the block."""
    found = StandIns(make)
    try:
        yield found
    finally:
        found.take_out()

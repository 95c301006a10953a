"""Counts the bytes of a training step: tensors alive at once, and tensors kept for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the tensors' storages; tied tensors share one and count once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class Rise(NamedTuple):
    """Change of a ledger over a stretch of time, and its highest point above the beginning of the stretch."""

    net: int
    high: int


class Ledger:
    """Counts the bytes of living storages, each once: `now`, and at their `peak` since the last lap."""

    def __init__(self) -> None:
        self.now = self.peak = self._start = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __contains__(self, t: Tensor) -> bool:
        return key_of(t) in self._known

    def enter(self, t: Tensor) -> None:
        """Counts the tensor's storage from now on."""
        storage = t.untyped_storage()
        key = int(storage._cdata)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._leave(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def lap(self) -> Rise:
        """Returns the change and the peak since the last lap, and begins the next one."""
        found = Rise(self.now - self._start, self.peak - self._start)
        self._start = self.peak = self.now
        return found

    def _leave(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class Live(TorchDispatchMode):
    """Counts, within the block, the living storages that operations make.

    Real and fake tensors count alike. Memory that a kernel takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = Ledger()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(args, kwargs or {}, out)
        return out

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Enters the outputs of one operation that are not its inputs, or views of them."""
        new = [t for t in _tensors(out) if t not in self.made]
        if new:
            given = {key_of(t) for t in _tensors((args, tuple(kwargs.values())))}
            for t in new:
                if key_of(t) not in given:
                    self.made.enter(t)


class Saved:
    """Counts the storages that autograd keeps for the backward, without `own`, the parameters and buffers."""

    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        self._own = {key_of(t) for t in own}
        self.kept = Ledger()

    def leave_out(self, t: Tensor) -> None:
        """Never counts the tensor's storage, which must outlive this object."""
        self._own.add(key_of(t))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts, within the block, every tensor saved for the backward as long as it exists."""
        with saved_tensors_hooks(self._count, _same):
            yield

    def _count(self, t: Tensor) -> Tensor:
        if t.layout == torch.strided and key_of(t) not in self._own:
            self.kept.enter(t)
        return t


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in an operation's arguments or outputs; cheaper than a pytree's leaves."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for entry in tree:
            yield from _tensors(entry)


def key_of(t: Tensor) -> int:
    """Returns one number for all tensors of one storage, as long as it exists."""
    return int(t.untyped_storage()._cdata)


def _same(t: Tensor) -> Tensor:
    return t

"""Memory in bytes as a step of training makes it: what is alive at once, and what the forward pass keeps for the backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage once, as tied weights are."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class Ledger:
    """Bytes of the storages entered here that are still alive, `now` and at their `peak`; each counts once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def enter(self, t: Tensor) -> None:
        """Counts the tensor's storage from now on."""
        storage, key = t.untyped_storage(), key_of(t)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._leave(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _leave(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class Live(TorchDispatchMode):
    """Within the block: what operations made and what of it is alive.

    Outputs of operations are seen, with real and with fake tensors; what a kernel takes for itself while it runs is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = Ledger()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {key_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and key_of(t) not in given:
                self.made.enter(t)
        return out


class Saved:
    """What autograd keeps for the backward, without `own`, the parameters and buffers."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {key_of(t) for t in own}
        self.kept = Ledger()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block every tensor that is saved for the backward is counted, as long as it exists."""
        with saved_tensors_hooks(self._count, _same):
            yield

    def _count(self, t: Tensor) -> Tensor:
        if t.layout == torch.strided and key_of(t) not in self._own:
            self.kept.enter(t)
        return t


def key_of(t: Tensor) -> int:
    """The same for all tensors of one storage, as long as it exists."""
    return int(t.untyped_storage()._cdata)


def _same(t: Tensor) -> Tensor:
    return t

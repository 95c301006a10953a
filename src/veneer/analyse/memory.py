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


class Live(TorchDispatchMode):
    """Within the block: bytes of the storages that operations made and that are still alive, `now` and at their `peak`.

    Outputs of operations are seen, with real and with fake tensors; what a kernel takes for itself while it runs is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _key(t) not in given and _key(t) not in self._known:
                self._born(t)
        return out

    def _born(self, t: Tensor) -> None:
        storage, key = t.untyped_storage(), _key(t)
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._died(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _died(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.now -= size


def _key(t: Tensor) -> int:
    """The same for all tensors of one storage."""
    return int(t.untyped_storage()._cdata)


class Saved:
    """Bytes that autograd keeps: of every storage once, without those of `own`, the parameters and buffers."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {_key(t) for t in own}
        self._sizes: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """What was kept within the block."""
        return sum(self._sizes.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block every tensor that is saved for the backward is counted."""
        with saved_tensors_hooks(self._count, _same):
            yield

    def _count(self, t: Tensor) -> Tensor:
        if t.layout == torch.strided and _key(t) not in self._own:
            self._sizes[_key(t)] = t.untyped_storage().nbytes()
        return t


def _same(t: Tensor) -> Tensor:
    return t

"""Blocks of a model whose parameters lie in files: one block at a time is in memory, read where it is used.

A module reads its parameters by attribute. In a block on disk that fills buffers, shared by all blocks, with
the block's numbers; buffers that someone still holds are replaced, not overwritten. Whoever lists parameters
gets empty ones on the meta device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import FormatError

Key = tuple[str, tuple[int, ...], torch.dtype]


class Extent(NamedTuple):
    """A tensor in an open file: `handle` of the file, its first byte, dtype and shape. where: for errors."""

    handle: int
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    where: str

    @property
    def n_bytes(self) -> int:
        """Returns the bytes of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def into(self, t: Tensor) -> None:
        """Reads the tensor into contiguous memory of its size. Raises FormatError for a file that ends."""
        view = as_bytes(t.detach())
        done = 0
        while done < len(view):
            n = os.preadv(self.handle, [view[done : done + (1 << 30)]], self.begin + done)
            if n == 0:
                raise FormatError(f"{self.where} ends {len(view) - done} bytes early; download it again")
            done += n

    def read(self) -> Tensor:
        """Returns the tensor."""
        found = torch.empty(self.shape, dtype=self.dtype)
        self.into(found)
        return found


def as_bytes(t: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the CPU."""
    flat: Any = t.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class OnDisk(dict[str, Any]):
    """The parameters of one module of block `number`: read by name they are real, listed they are empty."""

    def __init__(self, listed: Mapping[str, Any], shelf: Shelf, number: int, prefix: str) -> None:
        super().__init__(listed)
        self.shelf, self.number, self.prefix = shelf, number, prefix

    def __getitem__(self, name: str) -> Any:
        listed = super().__getitem__(name)
        if listed is None or not listed.is_meta:
            return listed
        return self.shelf.parameter(self.number, f"{self.prefix}{name}")


class Shelf:
    """The parameters of all blocks in files, and buffers for those of the block that is used."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        files: Callable[[int], Mapping[str, Extent]],
        device: torch.device | str,
    ) -> None:
        """files: returns the tensors of a block by the names of its parameters; it is called at every read.

        Blocks must be on the meta device. Each one's modules look their parameters up here from now on.
        """
        self.files, self.device = files, torch.device(device)
        self.current: int | None = None
        self.reads = self.made = 0  # blocks read and buffers made so far
        self._buffers: dict[Key, Tensor] = {}
        self._handed: dict[str, nn.Parameter] = {}  # of the current block
        self._keys: list[dict[str, Key]] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)
        for number, block in enumerate(blocks):
            self._keys.append({n: (n, tuple(p.shape), p.dtype) for n, p in block.named_parameters()})
            for name, module in block.named_modules():
                if module._parameters:
                    prefix = f"{name}." if name else ""
                    module._parameters = OnDisk(module._parameters, self, number, prefix)

    @property
    def block_bytes(self) -> int:
        """Returns the bytes of the largest block in memory."""
        return max(sum(math.prod(s) * d.itemsize for _, s, d in keys.values()) for keys in self._keys)

    @property
    def bytes(self) -> int:
        """Returns the bytes of all blocks in memory."""
        return sum(math.prod(s) * d.itemsize for keys in self._keys for _, s, d in keys.values())

    def parameter(self, number: int, name: str) -> nn.Parameter:
        """Returns a parameter of a block. Its numbers stay as long as anyone holds them."""
        if self.current != number:
            self._fill(number)
        return self._handed[name]

    @torch.no_grad()
    def _fill(self, number: int) -> None:
        self.current, self._handed = None, {}
        found = self.files(number)
        for name, key in self._keys[number].items():
            buffer = self._buffers.get(key)
            if buffer is None or _is_held(buffer):
                buffer = self._buffers[key] = torch.empty(key[1], dtype=key[2], device=self.device)
                self.made += 1
            self._read(found[name], buffer)
            self._handed[name] = nn.Parameter(buffer, requires_grad=False)
        self.current, self.reads = number, self.reads + 1

    def _read(self, found: Extent, buffer: Tensor) -> None:
        if buffer.device.type == "cpu" and found.dtype == buffer.dtype:
            found.into(buffer)
            return
        if self._scratch.numel() < found.n_bytes:
            self._scratch = torch.empty(found.n_bytes, dtype=torch.uint8)
        held = self._scratch[: found.n_bytes].view(found.dtype).view(found.shape)
        found.into(held)
        buffer.copy_(held)


def _is_held(buffer: Tensor) -> bool:
    """Returns True if another tensor has the buffer's memory: a view, or numbers kept for a backward pass."""
    return _count(buffer) > ALONE


def _count(buffer: Tensor) -> int:
    storage = buffer.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata))


ALONE = _count(torch.empty(1))


def shelf_of(model: nn.Module) -> Shelf | None:
    """Returns the shelf of a model with blocks on disk, or None for a model in memory."""
    found: Iterable[Any] = (m._parameters for m in model.modules())
    return next((p.shelf for p in found if isinstance(p, OnDisk)), None)

"""Reads the tensors of a CTranslate2 model file, version 6, half-precision weights.

Little-endian: u32 version; string; u32 revision; u32 count; then for each tensor its name, u8 rank,
u32 x rank shape, u8 dtype, u32 bytes, data. A string is u16 length with a closing zero byte.
"""

from __future__ import annotations

import struct
from typing import Any

HALF = 4


class Reader:
    """Walks through the bytes of a file."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        """Returns the next number of a struct format."""
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(kind)
        return int(value)

    def take(self, n: int) -> bytes:
        """Returns the next n bytes."""
        self.at += n
        return self.data[self.at - n : self.at]

    def text(self) -> str:
        """Returns the next string."""
        return self.take(self.number("H"))[:-1].decode()


def tensors(data: bytes) -> dict[str, Any]:
    """Returns the half-precision tensors by name. Raises ValueError for another version."""
    import torch

    reader = Reader(data)
    version = reader.number("I")
    if version != 6:
        raise ValueError(f"the CTranslate2 version must be 6, got {version}")
    reader.text()
    reader.number("I")
    found = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        dtype = reader.number("B")
        content = reader.take(reader.number("I"))
        if dtype == HALF:
            found[name] = torch.frombuffer(bytearray(content), dtype=torch.float16).reshape(shape)
    return found

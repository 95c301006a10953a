"""Random draws keyed by (seed, name): independent of processes and of other draws."""

from __future__ import annotations

import hashlib
import math

import torch


def keyed(seed: int, name: str) -> torch.Generator:
    """Returns a CPU generator whose stream depends on the seed and the name only."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def unit_rows(rows: int, columns: int, seed: int, name: str) -> torch.Tensor:
    """Returns (rows, columns) numbers of variance 1: the first rows of an endless matrix that is drawn row by
    row."""
    return (torch.rand(rows, columns, generator=keyed(seed, name)) * 2 - 1) * math.sqrt(3)

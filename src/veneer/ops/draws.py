"""Random draws keyed by (seed, name): the same on one process or eight, with or without the neighbours."""

from __future__ import annotations

import hashlib

import torch


def keyed(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

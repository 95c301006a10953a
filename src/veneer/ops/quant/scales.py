"""Scales of blocks in 8 bits each: powers of 2^(1/24), with one float for each 256 of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 256  # scales that share a float
STEPS = 24  # of a scale's code for a factor of 2
SHARES = tuple(2 ** (-k / STEPS) for k in range(256))  # of the largest scale


def scales(codes: Tensor, largest: Tensor) -> Tensor:
    """Returns the scale (blocks,) of every block in float32: codes (blocks,) uint8, largest (groups,)."""
    shares = torch.tensor(SHARES, dtype=torch.float32, device=codes.device).index_select(0, codes.int())
    return shares * largest.float().repeat_interleave(GROUP)[: len(shares)]


def between(values: Sequence[float]) -> tuple[float, ...]:
    """Returns the midpoints between neighbouring values."""
    return tuple((a + b) / 2 for a, b in itertools.pairwise(values))


def padded(flat: Tensor, size: int) -> Tensor:
    """Returns flat (n,) padded with zeros as (n / size rounded up, size)."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)

"""nf4: the quantiles of a normal distribution, and a scale for each block of 64 numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.ops.quant.formats import TINY, Format, Parts
from veneer.ops.quant.scales import GROUP, SHARES, between, padded, scales

BLOCK = 64  # numbers that share a scale


def _levels() -> tuple[float, ...]:
    """Returns NF4's 16 levels: 8 quantiles above 0, 7 below, and 0 (QLoRA, section 3 and appendix E)."""
    tail = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(tail, 0.5, n, dtype=torch.float64))[:-1] for n in (9, 8)
    )
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return tuple((levels / levels.abs().max()).float().tolist())


LEVELS = _levels()
PAIRS = tuple((a, b) for a in LEVELS for b in LEVELS)  # the two numbers of every byte


class NF4(Format):
    """codes (n / 2,) in uint8, two numbers each; absmax (blocks,) in uint8; largest (groups,) in W's dtype,
    with bfloat16's digits."""

    name = "nf4"
    names = ("codes", "absmax", "largest")

    def pack(self, W: Tensor) -> Parts:
        blocks = padded(W.float().reshape(-1), BLOCK)  # (blocks, 64)
        absmax = padded(blocks.abs().amax(1), GROUP)  # (groups, 256)
        largest = absmax.amax(1).bfloat16().float()
        rising = torch.tensor(between(SHARES[::-1]), device=W.device)
        shares = 255 - torch.bucketize(absmax / largest.clamp_min(TINY)[:, None], rising, out_int32=True)
        kept = shares.to(torch.uint8).view(-1)[: len(blocks)]
        a = scales(kept, largest).clamp_min(TINY)
        codes = torch.bucketize(
            blocks / a[:, None], torch.tensor(between(LEVELS), device=W.device), out_int32=True
        )
        pairs = codes.to(torch.uint8).view(-1, 2)
        return pairs[:, 0] * 16 + pairs[:, 1], kept, largest.to(W.dtype)

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, absmax, largest = parts
        # Two float32 looked up as one number of 64 bits: half as many look-ups, which are what this costs.
        table = torch.tensor(PAIRS, dtype=torch.float32, device=codes.device).view(torch.int64).view(-1)
        blocks = table.index_select(0, codes.int()).view(torch.float32).view(-1, BLOCK)
        W = blocks.mul_(scales(absmax, largest)[:, None])
        return W.view(-1)[: math.prod(shape)].view(shape).to(dtype)

"""spqr: 4 bits with a scale and a zero for each block of 16 numbers, and the outliers of every row apart.

w = s (c - z) with whole c and z in 0..15; of every row the hundredth of largest |w| is kept in bfloat16 with
its column. 5.07 bits a number. After SpQR, Dettmers et al. 2023, https://arxiv.org/abs/2306.03078, section 4:
groups of 16, minimum and maximum, 1 % of outliers. What differs: outliers are the largest numbers and not
those with the largest error of the outputs, no calibration compensates what was rounded, and s is in 8 bits
and z in 4 where SpQR has 3 and 3.

s is the power of 2^(1/24), near the block's range over 15, with the least squared error.
Error in W: 6 % of normal numbers and of heavy tails alike, where nf4 has 9 and 11 %.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.quant.formats import TINY, Format, Parts
from veneer.ops.quant.scales import GROUP, STEPS, padded, scales

BLOCK, TOP, ONE_IN = 16, 15, 100  # numbers of a block; largest code; numbers of a row of which one is kept
NEAR = range(-8, 4)  # steps of s that are tried; the lower ones find most of what was packed before


class SpQR(Format):
    """codes (n / 2,) and zeros (blocks / 2,) in uint8, two numbers each; shares (blocks,) in uint8; columns
    (out, k); largest (groups,) and values (out, k) in W's dtype with bfloat16's digits."""

    name = "spqr"
    names = ("codes", "zeros", "shares", "columns", "largest", "values")

    def pack(self, W: Tensor) -> Parts:
        columns, values = _outliers(W)
        inner = W.float().scatter(1, columns, 0.0)
        blocks = F.pad(inner, (0, -W.shape[1] % BLOCK)).view(-1, BLOCK)
        least = values.abs().amin(1).float().repeat_interleave(len(blocks) // len(W))[:, None]
        shares, largest, zeros = _grid(blocks)
        codes = _below(_codes(blocks, scales(shares, largest), zeros), zeros, scales(shares, largest), least)
        narrow = torch.int16 if W.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
        held = (_pairs(codes.view(-1)), _pairs(zeros), shares, columns.to(narrow))
        return *held, largest.to(W.dtype), values.to(W.dtype)

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, zeros, shares, columns, largest, values = parts
        z = _both(zeros)[: len(shares), None]
        W = (_both(codes).view(-1, BLOCK) - z) * scales(shares, largest)[:, None]
        W = W.view(shape[0], -1)[:, : shape[1]]
        return W.scatter(1, columns.long(), values.float()).to(dtype)


def _outliers(W: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (out, k), rising, and values of every row's largest numbers; the values in bfloat16."""
    columns = W.float().abs().topk(math.ceil(W.shape[1] / ONE_IN), dim=1).indices.sort(1).values
    return columns, W.gather(1, columns).bfloat16()


def _grid(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of s (blocks,), the powers of 2 that they are shares of (groups,), and z (blocks,)."""
    low, high = blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)
    width = ((high - low) / TOP).clamp_min(TINY)
    largest = padded(width, GROUP).amax(1).log2().ceil().exp2()
    spread = largest.repeat_interleave(GROUP)[: len(width)]
    first = (STEPS * (spread / width).log2()).floor()
    best = torch.full_like(width, math.inf)
    shares, zeros = torch.zeros_like(width, dtype=torch.uint8), torch.zeros_like(width, dtype=torch.uint8)
    for step in NEAR:
        tried = (first + step).clamp(0, 255).to(torch.uint8)
        s = scales(tried, largest)
        z = (-low / s).round_().clamp_(0, TOP)
        off = ((_codes(blocks, s, z) - z[:, None]) * s[:, None] - blocks).square().sum(1)
        better = off < best
        best = torch.where(better, off, best)
        shares, zeros = torch.where(better, tried, shares), torch.where(better, z.to(torch.uint8), zeros)
    return shares, largest, zeros


def _codes(blocks: Tensor, s: Tensor, z: Tensor) -> Tensor:
    return (blocks / s[:, None] + z[:, None]).round_().clamp_(0, TOP)


def _below(codes: Tensor, zeros: Tensor, s: Tensor, least: Tensor) -> Tensor:
    """The codes of numbers below the row's least outlier, so that packing again finds the same ones."""
    far = codes - zeros[:, None]
    over = (far.abs() * s[:, None] >= least) & (far != 0)
    return torch.where(over, codes - far.sign(), codes)


def _pairs(codes: Tensor) -> Tensor:
    """Codes (n,) of 4 bits as (n / 2,) bytes."""
    pairs = padded(codes.to(torch.uint8), 2)
    return pairs[:, 0] * 16 + pairs[:, 1]


def _both(pairs: Tensor) -> Tensor:
    """The numbers (2 n,) of bytes (n,), in float32."""
    return torch.stack([pairs >> 4, pairs & 15], 1).view(-1).float()

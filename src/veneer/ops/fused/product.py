"""y = x W' + s (x A') B + bias for rows sorted by adapter: one kernel for each stack of adapters.

Rows without an adapter take PyTorch's own product. No derivative: for serving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.segmented import Segment

ROWS = 16  # of a block; the least that a tensor core's product takes
COLUMNS, DEPTH = 64, 64
MOST_RANK = 64  # A, B and h of a block lie on the chip
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Blocks(NamedTuple):
    """At most ROWS rows of one adapter each: first row, number of rows, place in the stack, strength."""

    starts: Tensor
    counts: Tensor
    places: Tensor
    strengths: Tensor


class Plan(NamedTuple):
    """The rows of a batch: blocks by stack, the stretches of each stack, and those without."""

    rows: int
    blocks: Mapping[int, Blocks]
    stretches: Mapping[int, Sequence[tuple[int, int]]]
    bare: Sequence[tuple[int, int]]


def plan(segments: Sequence[tuple[int, Segment]], rows: int, device: torch.device) -> Plan:
    """Cuts segments, each given with its first row, sorted and without overlap, into blocks."""
    stretches: dict[int, list[tuple[int, int]]] = {}
    cut: dict[int, list[tuple[int, int, int, float]]] = {}
    bare, end = [], 0
    for start, s in segments:
        if start > end:
            bare.append((end, start))
        end = start + s.rows
        stretches.setdefault(s.stack, []).append((start, end))
        firsts = range(start, end, ROWS)
        cut.setdefault(s.stack, []).extend((i, min(ROWS, end - i), s.place, s.strength) for i in firsts)
    if end < rows:
        bare.append((end, rows))
    return Plan(rows, {stack: _blocks(some, device) for stack, some in cut.items()}, stretches, bare)


def _blocks(found: Sequence[tuple[int, int, int, float]], device: torch.device) -> Blocks:
    starts, counts, places, strengths = zip(*found, strict=True)
    first, n, place = torch.tensor([starts, counts, places], dtype=torch.int32, device=device)
    return Blocks(first, n, place, torch.tensor(strengths, dtype=torch.float32, device=device))


def fits(W: Tensor, rank: int) -> bool:
    """Tells if the kernel takes a weight of this dtype and adapters of this rank."""
    return W.dtype in DTYPES and 0 < rank <= MOST_RANK


def product(
    x: Tensor, W: Tensor, bias: Tensor | None, stacks: Mapping[int, tuple[Tensor, Tensor]], plan: Plan
) -> Tensor:
    """Returns y (rows, out). x: (rows, in), contiguous along in; W: (out, in); all of one dtype.

    stacks: A (n, r, in) and B (n, r, out) of each stack, any strides; rows of other stacks get W x alone.
    """
    y = x.new_empty(plan.rows, W.shape[0])
    bare = [*plan.bare, *(s for n, some in plan.stretches.items() if n not in stacks for s in some)]
    for begin, end in bare:
        y[begin:end] = F.linear(x[begin:end], W, bias)
    for number, (A, B) in stacks.items():
        _run(x, W, bias, A, B, y, plan.blocks[number])
    return y


def _run(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, y: Tensor, blocks: Blocks) -> None:
    from veneer.ops.fused import kernel

    rank = A.shape[1]
    kernel.launch(
        (len(blocks.starts), math.ceil(W.shape[0] / COLUMNS)),
        *(x, W, W if bias is None else bias, A, B, y, *blocks, W.shape[1], W.shape[0], rank),
        *(x.stride(0), *W.stride(), *A.stride(), *B.stride(), y.stride(0)),
        m=ROWS,
        n=COLUMNS,
        k=DEPTH,
        r=max(16, 1 << (rank - 1).bit_length()),
        has_bias=bias is not None,
        # Triton's interpreter multiplies bfloat16 wrongly, without an error.
        widen=kernel.INTERPRETED and x.dtype == torch.bfloat16,
    )

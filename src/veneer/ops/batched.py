"""y + (x A') B for a batch in which every row uses the factors of its own adapter.

x (b, t, in), y (b, t, out), A (n, r, in), B (n, r, out), ids (b,): row i is given adapter ids[i]. Adapter 0
is the base, whose factors are zero. Four ways to the same sum:

gather   each row's factors are copied side by side; two batched products bucket   rows are sorted into
buckets by adapter, as many as the fullest needs, and no factor is copied: for batches in which the resident
adapters have nearly as many rows each; the gradient at an empty place is 0 times a factor, and goes to some
row, so that learning wants finite factors masked   one product with all factors stacked, of which each row
keeps its own adapter's part, and one back: for few numbers of rank in all; a number of another adapter that
is not finite would spoil every row, so it wants finite factors grouped  rows sorted by adapter in one grouped
product (F.grouped_mm), or a product for each adapter that has rows; slowest on a CPU, and meant for GPUs, on
which none of this was measured
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STACKED = 512  # ranks in all up to which one product with all factors is cheapest for single tokens
SHORT = 8  # tokens a row up to which it is


class Layout(NamedTuple):
    """Facts about ids (b,) that all layers share.

    rows: indices of the rows with an adapter; the k-th is at place[k] of n - 1 buckets of `size`. filled: the
    row at each place, any row at free places. others: {r: mask (b, (n - 1) r), True outside the row's own},
    filled on request.
    """

    rows: Tensor
    place: Tensor
    filled: Tensor
    size: int
    others: dict[int, Tensor]


def add(
    x: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    ids: Tensor,
    *,
    way: str = "gather",
    layout: Layout | None = None,
) -> Tensor:
    """Adds (x A[ids]') B[ids] to y, which must be contiguous, in one of four ways; returns y.

    layout: of `lay_out(ids, n)`, where it is known already.
    """
    if way == "bucket":
        return _bucket(x, y, A, B, layout or lay_out(ids, A.shape[0]))
    if way == "masked":
        return _masked(x, y, A, B, _others(ids, A, layout))
    return (_grouped if way == "grouped" else _gather)(x, y, A, B, ids)


def choose(x: Tensor, A: Tensor, *, finite: bool, layout: Layout | None) -> str:
    """Returns the fastest suitable way for these sizes on a CPU, as measured in bench/bank.py.

    finite: whether all factors are known to be finite, and stay so. layout: of ids, where it is known.
    """
    n, r, _ = A.shape
    b, t, _ = x.shape
    if finite and (n - 1) * r <= STACKED and t <= SHORT:
        return "masked"
    if x.is_cuda and _groupable(x, A):
        return "grouped"
    harmless = finite or not torch.is_grad_enabled()
    if harmless and layout is not None and t <= SHORT and (n - 1) * layout.size <= 2 * b:
        return "bucket"
    return "gather"


def lay_out(ids: Tensor, n: int) -> Layout:
    """Returns the buckets of n adapters for ids (b,)."""
    rows = ids.nonzero()[:, 0]
    own = ids[rows] - 1
    counts = torch.bincount(own, minlength=n - 1)
    size = int(counts.max()) if len(rows) else 0
    order = torch.argsort(own, stable=True)
    place = torch.empty_like(own)
    place[order] = (
        own[order] * size
        + torch.arange(len(rows), device=ids.device)
        - (counts.cumsum(0) - counts)[own[order]]
    )
    filled = torch.zeros((n - 1) * size, dtype=torch.long, device=ids.device)
    filled[place] = rows
    return Layout(rows, place, filled, size, {})


def _gather(x: Tensor, y: Tensor, A: Tensor, B: Tensor, ids: Tensor) -> Tensor:
    h = torch.bmm(x, A.index_select(0, ids).mT)
    return y.baddbmm_(h, B.index_select(0, ids))


def _bucket(x: Tensor, y: Tensor, A: Tensor, B: Tensor, layout: Layout) -> Tensor:
    if not layout.size:
        return y
    t = x.shape[1]
    held = x.index_select(0, layout.filled).view(A.shape[0] - 1, layout.size * t, -1)
    change = torch.bmm(torch.bmm(held, A[1:].mT), B[1:]).view(-1, t, B.shape[2])
    if len(layout.rows) == len(y):
        return y.add_(change.index_select(0, layout.place))
    return y.index_add_(0, layout.rows, change.index_select(0, layout.place))


def _masked(x: Tensor, y: Tensor, A: Tensor, B: Tensor, others: Tensor) -> Tensor:
    b, t, _ = x.shape
    # (b, t, (n - 1) r); a product may overflow, inf * 0 is nan
    h = F.linear(x, A[1:].flatten(0, 1)).masked_fill_(others[:, None], 0)
    return y.view(b * t, -1).addmm_(h.view(b * t, -1), B[1:].flatten(0, 1)).view_as(y)


def _others(ids: Tensor, A: Tensor, layout: Layout | None) -> Tensor:
    """Returns (b, (n - 1) r): False at each row's own adapter, True elsewhere."""
    n, r, _ = A.shape
    if layout is not None and r in layout.others:
        return layout.others[r]
    others = (ids[:, None] != torch.arange(1, n, device=ids.device)).repeat_interleave(r, 1)
    if layout is not None:
        layout.others[r] = others
    return others


def _grouped(x: Tensor, y: Tensor, A: Tensor, B: Tensor, ids: Tensor) -> Tensor:
    t, order = x.shape[1], torch.argsort(ids, stable=True)
    each = x.index_select(0, order).flatten(0, 1)
    ends = torch.searchsorted(ids[order], torch.arange(A.shape[0], device=ids.device), right=True) * t
    if _groupable(x, A):
        offs = ends.to(torch.int32)
        change = F.grouped_mm(F.grouped_mm(each, A.mT, offs=offs), B, offs=offs)
    else:
        starts = [0, *ends.tolist()]
        parts = [(each[i:j] @ A[k].mT) @ B[k] for k, (i, j) in enumerate(pairwise(starts)) if j > i]
        change = torch.cat(parts) if parts else each.new_zeros(0, B.shape[2])
    return y.index_add_(0, order, change.view(-1, t, B.shape[2]))


def _groupable(x: Tensor, A: Tensor) -> bool:
    """Returns True if F.grouped_mm (torch 2.10) supports these.

    Needs strides in multiples of 16 bytes, no float64, and bfloat16 under compilation.
    """
    if not hasattr(F, "grouped_mm") or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return False
    return A.shape[1] * x.element_size() % 16 == 0 and A.shape[2] * x.element_size() % 16 == 0

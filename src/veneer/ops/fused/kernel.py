"""The kernel: y = x W' + s (x A') B + bias, tile by tile. It needs the package triton.

A program computes the rows of one block, which belong to one adapter, and `n` columns. It reads x once for
both products: x W' and h = x A' are summed side by side, and h B is added before y is written. So y is
written once, and h never leaves the chip. Each column's program computes h again: r / n of the base's work.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton refuses annotations by other names than its own, so its functions are not annotated.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _read(source, row, row_stride, row_fits, column, column_stride, column_fits):
    """Returns a tile of a matrix, 0 where a row or a column does not fit."""
    at = source + row[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(at, row_fits[:, None] & column_fits[None, :], 0.0)


# fmt: off
@triton.jit
def _tile(
    x, W, bias, A, B, y, starts, counts, places, strengths, n_in, n_out, rank,
    x_row, W_row, W_column, A_place, A_row, A_column, B_place, B_row, B_column, y_row,
    m: tl.constexpr, n: tl.constexpr, k: tl.constexpr, r: tl.constexpr,
    has_bias: tl.constexpr, widen: tl.constexpr,
):
    # fmt: on
    """Writes `n` columns of the m rows of a block; see launch."""
    block = tl.program_id(0)
    place = tl.load(places + block).to(tl.int64)
    inside = tl.arange(0, m) < tl.load(counts + block)
    row = tl.load(starts + block).to(tl.int64) + tl.arange(0, m)
    column = tl.program_id(1).to(tl.int64) * n + tl.arange(0, n)
    ranks, column_fits, rank_fits = tl.arange(0, r), column < n_out, tl.arange(0, r) < rank
    # tl.zeros is compiled code itself, which an interpreted kernel cannot call.
    total, h = tl.full((m, n), 0.0, tl.float32), tl.full((m, r), 0.0, tl.float32)
    for first in range(0, n_in, k):
        at = first + tl.arange(0, k)
        xs = _read(x, row, x_row, inside, at, 1, at < n_in)
        Ws = _read(W, at, W_column, at < n_in, column, W_row, column_fits)
        As = _read(A + place * A_place, at, A_column, at < n_in, ranks, A_row, rank_fits)
        if widen:
            xs, Ws, As = xs.to(tl.float32), Ws.to(tl.float32), As.to(tl.float32)
        total = tl.dot(xs, Ws, total, input_precision="ieee")
        h = tl.dot(xs, As, h, input_precision="ieee")
    Bs = _read(B + place * B_place, ranks, B_row, rank_fits, column, B_column, column_fits)
    if widen:
        Bs = Bs.to(tl.float32)
    h = (h * tl.load(strengths + block)).to(Bs.dtype)
    total = tl.dot(h, Bs, total, input_precision="ieee")
    if has_bias:
        total += tl.load(bias + column, column_fits, 0.0).to(tl.float32)[None, :]
    kept = inside[:, None] & column_fits[None, :]
    tl.store(y + row[:, None] * y_row + column[None, :], total.to(y.dtype.element_ty), kept)


INTERPRETED = not isinstance(_tile, triton.JITFunction)  # as TRITON_INTERPRET=1 asks for


def launch(grid: tuple[int, int], *tensors: Any, **sizes: Any) -> None:
    """Runs the kernel on a grid (blocks, columns)."""
    _tile[grid](*tensors, **sizes)

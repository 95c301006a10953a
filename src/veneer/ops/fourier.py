"""Multiplies x by a matrix with few Fourier coefficients, exactly, by fast transforms.

The matrix is D[p, q] = sum_l c_l cos(2 pi (p j_l / out + q k_l / in)). With few rows of x on a large matrix x
is transformed and D never made; with many on a small one D is made in each pass, and again in the backward.
Either way only x is kept. In the second case (cosines.py has the transform) a frozen layer's own product
backward is made together with D's. In the first, spectra of real numbers are kept by their first half, as
pairs (re, im) that lie apart: (half, 2, n), so that picking and adding up frequencies move whole rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.lowrank import in_place, is_traced, refuse_second_order
from veneer.ops.matrix import cosines
from veneer.ops.matrix.linalg import precise
from veneer.ops.scratch import scratch


class Places(NamedTuple):
    """Places of frequencies in half spectra: rows of the output, columns of the input, signs (n, 2, 1).

    Frequency k above half stands at size - k as its conjugate; the sign of the imaginary part says how often
    that was so.
    """

    rows: Tensor
    columns: Tensor
    signs: Tensor


def places(j: Tensor, k: Tensor, out: int, in_: int) -> Places:
    """Returns the places of the frequencies (j_l, k_l), indices (n,) below out and in."""
    flipped = (j > out // 2) ^ (k <= in_ // 2)
    imaginary = torch.where(flipped, -1.0, 1.0)
    signs = torch.stack([torch.ones_like(imaginary), imaginary], 1)[..., None]
    return Places(torch.where(j > out // 2, out - j, j), torch.where(k > in_ // 2, in_ - k, k), signs)


def added(
    y: Tensor,
    x: Tensor,
    c: Tensor,
    j: Tensor,
    k: Tensor,
    *,
    writable: bool = False,
    frozen: Tensor | None = None,
) -> Tensor:
    """Returns y + x D': y (.., out), x (.., in), c (n,) for frequencies j, k (n,); at least float32.

    writable: y belongs to the caller, and nobody else reads it before this changes it. frozen: W (out, in)
    where y is x W' and what takes no gradient; where D is made, one product backward then does for W + D.
    """
    out, in_, rows = y.shape[-1], x.shape[-1], x.numel() // max(1, x.shape[-1])
    if in_ % 2 == 0 and _small(out, in_, rows, x.dtype):
        if is_traced():
            return y + x @ dense(c, j, k, out, in_, x.dtype).mT
        own = y if frozen is None else y.detach()
        made: Tensor = _Made.apply(own, x, c, j, k, frozen, writable and in_place(own))
        return made
    at = places(j, k, out, in_)
    if is_traced():
        return y + _product(_rows(x), c, at, out).to(x.dtype).view(y.shape)
    change: Tensor = _Transformed.apply(x, c, *at, out)
    return y + change


def dense(c: Tensor, j: Tensor, k: Tensor, out: int, in_: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns D (out, in) in c's or another dtype: the left half is transformed, the right is its mirror."""
    F = torch.zeros(out, in_, dtype=c.dtype, device=c.device).index_put_((j, k), c)
    # (out, half): cosines do not know the direction of the transform
    left = torch.fft.rfft2(F).real.to(dtype or c.dtype)
    right = left[:, 1 : in_ - in_ // 2].flip(0, 1).roll(1, 0)  # D[p, q] = D[-p, -q]
    return torch.cat([left, right], 1)


def _small(out: int, in_: int, rows: int, dtype: torch.dtype) -> bool:
    """Returns True if building D is faster than transforming x, as measured on one core."""
    cheap = 4000 if dtype in (torch.bfloat16, torch.float16) else 600
    return out * in_ * (0.5 + rows / cheap) < 1.1 * rows * (out + in_)


def _weights(place: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Returns the weights of a half spectrum: 1 at both ends, else 1/2 for a number and its conjugate."""
    return torch.where((place == 0) | (2 * place == size), 1.0, 0.5).to(dtype)


def waves(frequencies: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of 2 pi f p / size, (n, size) each, for frequencies f (n,)."""
    # exact: whole numbers
    turns = frequencies[:, None] * torch.arange(size, device=frequencies.device) % size
    angle = turns.double() * (2 * torch.pi / size)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rows(x: Tensor) -> Tensor:
    return precise(x).reshape(-1, x.shape[-1])


def _product(x: Tensor, c: Tensor, at: Places, out: int) -> Tensor:
    weights = c * _weights(at.rows, out, c.dtype)
    picked = _analysed(x)[at.columns] * (weights[:, None, None] * at.signs).to(x.dtype)
    return _composed(_added(picked, at.rows, out), out)


def _analysed(x: Tensor) -> Tensor:
    """Returns the half spectrum (half, 2, n) of (n, size)."""
    return torch.view_as_real(torch.fft.rfft(x)).permute(1, 2, 0).contiguous()


def _added(picked: Tensor, rows: Tensor, size: int) -> Tensor:
    return picked.new_zeros(size // 2 + 1, *picked.shape[1:]).index_add(0, rows, picked)


def _composed(Z: Tensor, size: int) -> Tensor:
    """Returns Re sum_j Z_j exp(2 pi i p j / size), (half, 2, n) -> (n, size), for weighted Z."""
    found: Tensor = torch.fft.irfft(
        torch.view_as_complex(Z.permute(2, 0, 1).contiguous()), n=size, norm="forward"
    )
    return found


class _Transformed(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, c: Tensor, rows: Tensor, columns: Tensor, signs: Tensor, out: int
    ) -> Tensor:
        ctx.save_for_backward(x, c, rows, columns, signs)
        return _product(_rows(x), c, Places(rows, columns, signs), out).to(x.dtype).view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        x, c, rows, columns, signs = ctx.saved_tensors
        dZ = _analysed(_rows(dy))[rows] * signs.to(precise(dy).dtype)
        dc = (dZ * _analysed(_rows(x))[columns]).sum((1, 2)).to(c.dtype) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            weights = (c * _weights(columns, x.shape[-1], c.dtype)).to(dZ.dtype)
            spectrum = _added(dZ * weights[:, None, None], columns, x.shape[-1])
            dx = _composed(spectrum, x.shape[-1]).to(x.dtype).view_as(x)
        return dx, dc, None, None, None, None


class _Made(Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, c: Tensor, j: Tensor, k: Tensor, W: Tensor | None, in_place: bool
    ) -> Tensor:
        size = (y.shape[-1], x.shape[-1])
        where = cosines.spots(j, k, size, c.dtype)
        ctx.save_for_backward(x, c, W, *where)
        D = cosines.matrix(c, where, size, x.dtype)
        if in_place:
            y.view(-1, size[0]).addmm_(x.reshape(-1, size[1]), D.mT)
            ctx.mark_dirty(y)
            return y
        return torch.addmm(y.reshape(-1, size[0]), x.reshape(-1, size[1]), D.mT).view(y.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        x, c, W, *spots = ctx.saved_tensors
        where, size = cosines.Spots(*spots), (dy.shape[-1], x.shape[-1])
        dx = dc = None
        if ctx.needs_input_grad[1]:
            D = cosines.matrix(c, where, size, dy.dtype)
            dx = dy @ (D if W is None else D.add_(W))
        if ctx.needs_input_grad[2]:
            G = scratch("matrix", size, x.dtype, x.device)  # the gradient of the matrix
            dc = cosines.gradient(
                torch.mm(dy.reshape(-1, size[0]).mT, x.reshape(-1, size[1]), out=G), where
            ).to(c.dtype)
        return (dy if ctx.needs_input_grad[0] else None), dx, dc, None, None, None, None

"""x times a matrix that has few Fourier coefficients: by fast transforms of x, never by the matrix itself.

The matrix is D[p, q] = sum_l c_l cos(2 pi (p j_l / out + q k_l / in)). Spectra of real numbers are kept by their first
half, as pairs (re, im) that lie apart: (half, 2, n), so that picking and adding up frequencies move whole rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.linalg import precise
from veneer.ops.lowrank import is_traced, refuse_second_order


class Places(NamedTuple):
    """Where frequencies lie in half spectra: rows in the output's, columns in the input's, and (n, 2, 1) signs.

    Frequency k above half stands at size - k as its conjugate; the sign of the imaginary part says how often that was so.
    """

    rows: Tensor
    columns: Tensor
    signs: Tensor


def places(j: Tensor, k: Tensor, out: int, in_: int) -> Places:
    """The places of the frequencies (j_l, k_l), indices (n,) below out and in."""
    flipped = (j > out // 2) ^ (k <= in_ // 2)
    imaginary = torch.where(flipped, -1.0, 1.0)
    signs = torch.stack([torch.ones_like(imaginary), imaginary], 1)[..., None]
    return Places(torch.where(j > out // 2, out - j, j), torch.where(k > in_ // 2, in_ - k, k), signs)


def product(x: Tensor, c: Tensor, at: Places, out: int) -> Tensor:
    """x D': x (.., in), c (n,) -> (.., out) in x's dtype, computed in float32 at least. Only x is kept for the backward."""
    if is_traced():
        return _product(_rows(x), c, at, out).to(x.dtype).view(*x.shape[:-1], out)
    y: Tensor = _Product.apply(x, c, *at, out)
    return y


def dense(c: Tensor, j: Tensor, k: Tensor, out: int, in_: int) -> Tensor:
    """D (out, in) itself."""
    F = torch.zeros(out, in_, dtype=c.dtype, device=c.device).index_put((j, k), c)
    D: Tensor = torch.fft.ifft2(F, norm="forward").real
    return D


def waves(frequencies: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi f p / size, (n, size) each, for frequencies f (n,)."""
    turns = frequencies[:, None] * torch.arange(size, device=frequencies.device) % size  # exact: whole numbers
    angle = turns.double() * (2 * torch.pi / size)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rows(x: Tensor) -> Tensor:
    return precise(x).reshape(-1, x.shape[-1])


def _product(x: Tensor, c: Tensor, at: Places, out: int) -> Tensor:
    picked = _analysed(x)[at.columns] * (c[:, None, None] * at.signs).to(x.dtype)
    return _composed(_added(picked, at.rows, out), out)


def _analysed(x: Tensor) -> Tensor:
    """(n, size) -> its half spectrum (half, 2, n)."""
    return torch.view_as_real(torch.fft.rfft(x)).permute(1, 2, 0).contiguous()


def _added(picked: Tensor, rows: Tensor, size: int) -> Tensor:
    return picked.new_zeros(size // 2 + 1, *picked.shape[1:]).index_add(0, rows, picked)


def _composed(Z: Tensor, size: int) -> Tensor:
    """Re sum_j Z_j exp(2 pi i p j / size), (half, 2, n) -> (n, size)."""
    weight = torch.full((Z.shape[0], 1, 1), 0.5, dtype=Z.dtype, device=Z.device)  # all but the ends stand for two
    weight[0] = 1
    if size % 2 == 0:
        weight[-1] = 1
    found: Tensor = torch.fft.irfft(torch.view_as_complex((Z * weight).permute(2, 0, 1).contiguous()), n=size, norm="forward")
    return found


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, rows: Tensor, columns: Tensor, signs: Tensor, out: int) -> Tensor:
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
            spectrum = _added(dZ * c[:, None, None].to(dZ.dtype), columns, x.shape[-1])
            dx = _composed(spectrum, x.shape[-1]).to(x.dtype).view_as(x)
        return dx, dc, None, None, None, None

"""A matrix that is a sum of few cosines, and the gradient of their sizes, by a complex transform.

D[p, q] = sum_l c_l cos(2 pi (p j_l / out + q k_l / in)). Neighbours D[p, 2 q] and D[p, 2 q + 1] are the real
and the imaginary part of one number, so that the transform's result is D as it lies in memory: no half of it
is a mirror of the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.scratch import scratch


class Spots(NamedTuple):
    """Non-zero places of a flattened spectrum (out, in / 2): 2n indices, and the weights of c, (2n, 2)."""

    at: Tensor
    weights: Tensor


def spots(j: Tensor, k: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Spots:
    """Returns the spots of the frequencies (j_l, k_l), indices (n,) below out and in; in must be even.

    One cosine is the half sum of exp(i t) and exp(-i t), and i times the same a step of 2 pi k / in further
    on.
    """
    out, half = size[0], size[1] // 2
    at = torch.cat([j * half + k % half, (out - j) % out * half + -k % half])
    step = k.to(dtype) * (torch.pi / half)
    cos, sin = step.cos() / 2, step.sin() / 2
    return Spots(at, torch.stack([torch.cat([0.5 - sin, 0.5 + sin]), torch.cat([cos, cos])], 1))


def matrix(c: Tensor, where: Spots, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Returns D (out, in) in dtype, in working memory that the next call of this file overwrites."""
    numbers = where.weights * c.repeat(2)[:, None]
    shape, kind = (size[0], size[1] // 2), c.dtype.to_complex()
    spectrum = scratch("spectrum", shape, kind, c.device).zero_()
    spectrum.view(-1).index_put_((where.at,), torch.view_as_complex(numbers), accumulate=True)
    D = torch.view_as_real(torch.fft.ifft2(spectrum, norm="forward")).view(size)
    return D if dtype == D.dtype else scratch("matrix", size, dtype, c.device).copy_(D)


def gradient(G: Tensor, where: Spots) -> Tensor:
    """Returns dc (n,) in the weights' dtype for the gradient G (out, in) of D."""
    shape, kind = (G.shape[0], G.shape[1] // 2), where.weights.dtype.to_complex()
    numbers = scratch("spectrum", shape, kind, G.device)
    torch.view_as_real(numbers).view(G.shape).copy_(G)
    found = torch.fft.fft2(numbers)
    return (torch.view_as_real(found).view(-1, 2)[where.at] * where.weights).sum(1).view(2, -1).sum(0)

"""Best low-rank factors of a matrix, a product, or a sum of products, with their error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.ops.matrix.linalg import precise


class Truncated(NamedTuple):
    """A (k, in), B (out, k) with singular values split evenly; error: ||D - B A|| / ||D||."""

    A: Tensor
    B: Tensor
    error: float


def choose_rank(spectrum: Tensor, rank: int | None, energy: float | None) -> int:
    """Returns the number of singular values to keep: at most `rank`, above rounding, enough for `energy`.

    energy is the share of the squared norm, in (0, 1]. At least one is kept. Raises ConfigError for
    impossible values.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be >= 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy must be in (0, 1], got {energy}")
    real = int((spectrum > len(spectrum) * torch.finfo(spectrum.dtype).eps * spectrum[0]).sum())
    keep = real if rank is None else min(rank, real)
    if energy is not None and energy < 1:
        share = spectrum.square().cumsum(0) / spectrum.square().sum().clamp_min(
            torch.finfo(spectrum.dtype).tiny
        )
        keep = min(keep, int((share < energy).sum()) + 1)
    return max(1, keep)


def truncate(D: Tensor, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Returns the best factors of D (out, in) in the Frobenius norm (Eckart & Young), by an exact SVD."""
    U, S, Vh = torch.linalg.svd(precise(D), full_matrices=False)
    return _cut(U, S, Vh, rank, energy)


def truncate_product(B: Tensor, A: Tensor, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Returns the best factors of B A for B (out, k), A (k, in), by two thin QRs and a k x k SVD."""
    QB, RB = torch.linalg.qr(precise(B))
    QA, RA = torch.linalg.qr(precise(A).mT)
    U, S, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    return _cut(QB @ U, S, Vh @ QA.mT, rank, energy)


def _cut(U: Tensor, S: Tensor, Vh: Tensor, rank: int | None, energy: float | None) -> Truncated:
    k = choose_rank(S, rank, energy)
    root = S[:k].sqrt()
    norm = float(S.norm())
    return Truncated(root[:, None] * Vh[:k], U[:, :k] * root, float(S[k:].norm()) / norm if norm else 0.0)

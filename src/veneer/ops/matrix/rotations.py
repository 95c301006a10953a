"""Rotations of blocks from skew-symmetric generators, as differences from the identity."""

from __future__ import annotations

import torch
from torch import Tensor


def skew(upper: Tensor, size: int) -> Tensor:
    """Returns Q = U - U' (n, size, size) for the strict upper triangles of U, row by row (n, size (size - 1)
    / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    flat = upper.new_zeros(len(upper), size * size).index_copy(1, rows * size + columns, upper)
    U = flat.view(-1, size, size)
    return U - U.mT


def cayley(Q: Tensor) -> Tensor:
    """Returns (I - Q) (I + Q)^-1 - I = -2 Q (I + Q)^-1 of Q (n, b, b): orthogonal to rounding."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    solved: Tensor = torch.linalg.solve(eye + Q, -2 * Q)  # Q and (I + Q)^-1 commute
    return solved


def cayley_series(Q: Tensor, terms: int) -> Tensor:
    """Returns 2 Q + .. + 2 Q^(terms - 2) + Q^(terms - 1), the Neumann series of (I + Q) (I - Q)^-1 - I.

    As in PEFT, 2 terms stand for 2 Q, and 3 for as many as 4. It converges if the norm of Q is below 1.
    """
    total, power = 2 * Q, Q
    for _ in range(max(terms, 4) - 3 if terms > 2 else 0):
        power = power @ Q
        total = total + 2 * power
    return total if terms == 2 else total + power @ Q


def turn(T: Tensor, D: Tensor) -> Tensor:
    """Returns T times the block diagonal matrix of D (n, b, b), or of one D (1, b, b) for all: T (.., n
    b)."""
    blocks = T.unflatten(-1, (-1, D.shape[-1]))
    product = blocks @ D[0] if len(D) == 1 else torch.einsum("...nk,nkc->...nc", blocks, D)
    return product.flatten(-2)


def off_orthogonal(D: Tensor) -> float:
    """Returns the largest number of |R R' - I| for R = I + D (n, b, b)."""
    R = D + torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)
    return float((R @ R.mT - torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)).abs().max())


def butterfly(size: int, block: int, level: int) -> Tensor:
    """Returns the permutation (size,) of BOFT's factor `level` for blocks of even size.

    Half blocks are taken in groups of 2^(level + 1), those at even places first; at level 0 it is the
    identity.
    """
    if level == 0:
        return torch.arange(size)
    half, group = block // 2, 2 ** (level + 1)
    places = torch.arange(size).view(-1, group, half)
    return torch.cat([places[:, 0::2], places[:, 1::2]], 1).flatten()

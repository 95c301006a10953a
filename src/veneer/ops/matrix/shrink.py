"""Projections of a matrix to fewer or smaller singular values, by the eigenvectors of its smaller Gram
matrix.

W V V' for the leading right singular vectors V (or U U' W for the left ones) needs no singular value
decomposition of W, and one eigendecomposition on the smaller side is an order of magnitude cheaper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.matrix.linalg import precise, symmetric, symmetric_product


class Spectrum(NamedTuple):
    """S (k,), largest first, and Q: right singular vectors (in, k) of W (out, in) if `right`, else left (out,
    k).
    """

    S: Tensor
    Q: Tensor
    right: bool

    def weigh(self, W: Tensor, w: Tensor) -> Tensor:
        """Returns W with its i-th singular value times w[i], for the first len(w); others become 0."""
        Q = self.Q[:, : len(w)]
        made = (W.to(Q) @ (Q * w)) @ Q.mT if self.right else (Q * w) @ (Q.mT @ W.to(Q))
        return made.to(W.dtype)


def spectrum(W: Tensor) -> Spectrum:
    """Returns all singular values of W (out, in) and the singular vectors of its smaller side."""
    right = W.shape[1] <= W.shape[0]
    wide = precise(W).double()
    long = wide.mT if right else wide
    w, Q = symmetric(symmetric_product(long, long))
    return Spectrum(w.clamp_min(0).sqrt().flip(0), Q.flip(-1), right)


def rank_of_energy(S: Tensor, energy: float) -> int:
    """Returns the least k whose squared singular values S[:k] hold the share `energy` of all; at least 1."""
    squares = S.double().square()
    total = squares.sum()
    if not total > 0:
        return 1
    return max(1, min(len(S), int((squares.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1))


def soften(S: Tensor, amount: float) -> Tensor:
    """Returns by what each singular value is multiplied when all are lowered by `amount`, to 0 at the least.

    The proximal step of `amount` times the nuclear norm (Cai, Candes & Shen 2010).
    """
    return torch.where(S > amount, 1 - amount / S.clamp_min(torch.finfo(S.dtype).tiny), 0.0)

"""Rows of a thin matrix that express all others with small coefficients: a gauge-fixed product.

B A with B (out, r) has r (out + in) numbers and r^2 of them say nothing, as B M^-1 M A is the same for any M.
With M = B[p] for r rows p, the rows p of B M^-1 are the identity: r (out + in) - r^2 numbers are left.  PIFA
2025, https://arxiv.org/abs/2501.19090. The rows are those of partial pivoting, then exchanged for others
while a coefficient is above LARGEST (the maxvol algorithm, Goreinov et al. 2010), so that rounding the
coefficients costs little.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 1.25


class Pivots(NamedTuple):
    """rows (r,) of the pivots, others (out - r,), and C (out - r, r) with B[others] = C B[rows]."""

    rows: Tensor
    others: Tensor
    C: Tensor

    @property
    def order(self) -> Tensor:
        """Returns the place of each row of B among pivots followed by the others: (out,) int64."""
        place = torch.empty(len(self.rows) + len(self.others), dtype=torch.int64, device=self.rows.device)
        place[torch.cat([self.rows, self.others])] = torch.arange(len(place), device=place.device)
        return place


def pivots(B: Tensor, swaps: int = 4) -> Pivots:
    """Returns r pivot rows of B (out, r), which must have rank r, and the coefficients of the other rows, in
    float64.

    swaps: exchanges at most, in multiples of r.

    """
    B = B.double()
    out, r = B.shape
    basis = torch.linalg.qr(B).Q  # any basis of the columns has the same pivots; this one is well conditioned
    order = _partial_pivots(basis)
    X = torch.linalg.solve(basis[order[:r]].mT, basis.mT).mT  # (out, r), the identity at the pivots
    rows = order[:r].clone()
    for _ in range(swaps * r):
        at = int(X.abs().argmax())
        i, j = divmod(at, r)
        if float(X[i, j].abs()) <= LARGEST:
            break
        step = X[i].clone()
        step[j] -= 1
        X -= torch.outer(X[:, j] / X[i, j], step)
        rows[j] = i
    rows = rows.sort().values
    is_other = torch.ones(out, dtype=torch.bool, device=B.device)
    is_other[rows] = False
    others = is_other.nonzero()[:, 0]
    return Pivots(rows, others, torch.linalg.solve(basis[rows].mT, basis[others].mT).mT)


def _partial_pivots(B: Tensor) -> Tensor:
    """Returns the rows of B (out, r) in the order of Gaussian elimination: (out,)."""
    order = torch.arange(len(B), device=B.device)
    for k, p in enumerate((torch.linalg.lu_factor(B).pivots - 1).tolist()):
        if p != k:
            order[[k, p]] = order[[p, k]]
    return order

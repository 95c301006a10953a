"""Sketches a matrix given as a stream of summands: two thin products, and its leading part from them.

Tropp, Yurtsever, Udell & Cevher 2017, https://arxiv.org/abs/1609.00048: of G (m, n) one keeps Y = G Omega (m,
k) and Z = Psi G (l, n) for fixed random Omega and Psi. Both are linear in G, so that pieces may come in any
order and from any process. With Q an orthonormal basis of Y's columns, G is nearly Q X where X solves (Psi Q)
X = Z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tests(NamedTuple):
    """Omega (n, k) and Psi (l, m); identity and empty if the sketch would not be smaller than G."""

    Omega: Tensor
    Psi: Tensor


class Svd(NamedTuple):
    """U (m, q), S (q,), Vh (q, n) with U S Vh near a matrix (m, n)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def tests(m: int, n: int, k: int, draw: torch.Generator) -> Tests:
    """Returns Gaussian test matrices for G (m, n): k columns, l = 2 k + 1 rows (section 4.5)."""
    rows = 2 * k + 1
    if k * m + rows * n >= m * n:
        return Tests(torch.eye(n), torch.empty(0, m))
    return Tests(torch.randn(n, k, generator=draw), torch.randn(rows, m, generator=draw))


def leading(Y: Tensor, Z: Tensor, Psi: Tensor, rank: int) -> Svd:
    """Returns at most `rank` leading singular triplets of G, from Y = G Omega, Z = Psi G and Psi.

    Exact where Omega was the identity.
    """
    if not len(Psi):
        U, S, Vh = torch.linalg.svd(Y, full_matrices=False)
        return Svd(U[:, :rank], S[:rank], Vh[:rank])
    Q = torch.linalg.qr(Y).Q
    core = torch.linalg.qr(Psi @ Q)
    X = torch.linalg.solve_triangular(core.R, core.Q.mT @ Z, upper=True)  # (k, n), the least-squares solution
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return Svd(Q @ U[:, :rank], S[:rank], Vh[:rank])

"""LoLDU: W' = W + P L (sigma diag(z) - sigma_0 diag(z_0)) U, P L D U = W, D trained.  Shi et al. 2024, https://arxiv.org/abs/2410.13618

W is factored once; the first r pivots z, and one sigma for all of them, are trained between the frozen columns of P L and
rows of U. P is applied to L's rows when they are made, so that no matrix stands for it, and the start is subtracted, so
that the base is never written. `basis="svd"` puts the leading singular vectors in the place of L and U.

Parameters: r + 1 a layer.
State: z, sigma, and the frozen factors with their start, r (in + out) numbers: factoring again, elsewhere, could choose other pivots.
Cost: that of a LoRA of rank r, less its gradients; keeps r numbers a token for the backward. Merged: none.
Use: with basis "svd" where very few trained numbers are wanted, at a rate some 60 times that of "lu" (on the built-in model 0.128,
and 0.002, the default there); with "lu" to repeat the paper.
Against: the first r pivots of an LU are no approximation of W (the singular vectors are the best), L and U are not
orthogonal although the paper says so, and the released code saves neither sigma nor the factors.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, suggest
from veneer.methods.base.delta import FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import check_rank, leading_svd, precise
from veneer.sites import Site

BASES = ("lu", "svd")


@final
class LoLDU(FactoredDelta):
    """z (r,) and sigma () start as z0 and sigma0; L (out, r) is P L, U (r, in)."""

    L: Tensor
    U: Tensor
    z0: Tensor
    sigma0: Tensor

    def __init__(
        self, site: Site, *, rank: int = 64, alpha: float | None = None, basis: str = "lu", seed: int = 0
    ) -> None:
        """
        rank: r, the pivots that are trained, at most min(out, in)
        alpha: sigma starts as alpha / r; at 1 unless given
        basis: between which frozen factors: lu or svd
        seed: draws the sketch of a large layer's svd
        """
        super().__init__()
        check_rank(rank, site.weight(), site.name)
        if basis not in BASES:
            raise ConfigError(f"unknown basis {basis!r}{suggest(basis, BASES)}")
        if alpha is not None and not 0 < alpha < math.inf:
            raise ConfigError(f"alpha must be a number above 0, not {alpha}")
        W = precise(site.weight().detach())
        L, z, U = leading_svd(W, rank, keyed(seed, site.name)) if basis == "svd" else _ldu(W, rank)
        dtype = master_dtype(site)
        sigma = torch.tensor(1.0 if alpha is None else alpha / rank, dtype=dtype, device=W.device)
        for name, t in (("L", L), ("U", U), ("z0", z), ("sigma0", sigma)):
            self.register_buffer(name, t.to(dtype).clone())
        self.z, self.sigma = nn.Parameter(self.z0.clone()), nn.Parameter(self.sigma0.clone())

    def factors(self, site: Site) -> Factors:
        return Factors(self.U, self.L * (self.sigma * self.z - self.sigma0 * self.z0))


def _ldu(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P L[:, :r] (out, r), D[:r] and U[:r] (r, in) of W = P L D U with ones on the diagonals of L and U."""
    P, L, U = torch.linalg.lu(W)
    pivots = U.diagonal()[:rank]
    unit = torch.where(pivots[:, None] == 0, 0, U[:rank] / torch.where(pivots == 0, 1, pivots)[:, None])
    return L[:, :rank][P.argmax(1)], pivots, unit

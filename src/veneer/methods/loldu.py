"""LoLDU: W' = W + P L (sigma diag(z) - sigma_0 diag(z_0)) U, P L D U = W, D trained.  Shi et al. 2024,
https://arxiv.org/abs/2410.13618

W is factored once. The first r pivots z and one sigma for all of them are trained, between the frozen columns
of P L and rows of U. P permutes the rows of L at the start. The start is subtracted, so the base is never
written. `basis="svd"` replaces L and U by the leading singular vectors.

Parameters: r + 1 a layer.
State: z, sigma, and the frozen factors with their start, r (in + out) numbers: another machine could pivot
differently.
Cost: a LoRA of rank r without its gradients. The backward keeps r numbers per token; merged: none.
Use: very few trained numbers, with basis "svd", at about 60 times the rate of "lu" (on the built-in model
0.128 against 0.002, the default there). Basis "lu" repeats the paper.
Against: the first r pivots of an LU do not approximate W; the singular vectors are the best. L and U are not
orthogonal, although the paper says so. The released code saves neither sigma nor the factors.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from veneer.methods.base.checks import check_choice, check_rank, scaling_of
from veneer.methods.base.delta import FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import leading_svd, precise
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
        rank: r, the number of trained pivots, at most min(out, in)
        alpha: sigma starts at alpha / r (default: at 1)
        basis: frozen factors: lu or svd
        seed: key of the sketch for the svd of large layers
        """
        super().__init__()
        check_rank(rank, site)
        check_choice("basis", basis, BASES)
        scaling = scaling_of(alpha, rank, default=1.0)
        W = precise(site.weight().detach())
        L, z, U = leading_svd(W, rank, keyed(seed, site.key)) if basis == "svd" else _ldu(W, rank)
        dtype = master_dtype(site)
        sigma = torch.tensor(scaling, dtype=dtype, device=W.device)
        for name, t in (("L", L), ("U", U), ("z0", z), ("sigma0", sigma)):
            self.register_buffer(name, t.to(dtype).clone())
        self.z, self.sigma = nn.Parameter(self.z0.clone()), nn.Parameter(self.sigma0.clone())

    def factors(self, site: Site) -> Factors:
        return Factors(self.U, self.L * (self.sigma * self.z - self.sigma0 * self.z0))


def _ldu(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns P L[:, :r] (out, r), D[:r] and U[:r] (r, in) of W = P L D U with ones on the diagonals of L and
    U."""
    P, L, U = torch.linalg.lu(W)
    pivots = U.diagonal()[:rank]
    unit = torch.where(pivots[:, None] == 0, 0, U[:rank] / pivots[:, None])
    return L[:, :rank][P.argmax(1)], pivots, unit

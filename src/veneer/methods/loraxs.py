"""LoRA-XS: W' = W + s U S R V', U S V' the leading singular triplets of W.  Balazy et al. 2024,
https://arxiv.org/abs/2405.17604

Only the small square R between frozen factors of W is trained. The paper starts R with noise of size 1e-5.
Here R starts at zero, which has a gradient too and equals the base exactly.

Parameters: r^2 a layer, whatever its width.
State: R and the frozen factors; the randomised decomposition is not repeated.
Cost: a LoRA of rank r without the gradients of its factors. The backward keeps r numbers per token;
merged: none.
Use: many adapters of one base, or little memory for the optimiser's moments.
Against: the change stays within the leading directions of W. Full fine-tuning also moves in the others.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from veneer.methods.base.checks import check_dropout, check_rank, scaling_of
from veneer.methods.base.delta import FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import leading_svd
from veneer.sites import Site


@final
class LoRAXS(FactoredDelta):
    """R (r, r) starts at zero; A (r, in) = V', L (out, r) = U S."""

    A: Tensor
    L: Tensor

    def __init__(
        self, site: Site, *, rank: int = 32, alpha: float | None = None, dropout: float = 0.0, seed: int = 0
    ) -> None:
        """
        rank: r, at most min(out, in)
        alpha: s = alpha / r (default: s = 1)
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        seed: key of the sketch for the decomposition of large layers
        """
        super().__init__()
        check_rank(rank, site)
        check_dropout(dropout)
        self.dropout, self.scaling = dropout, scaling_of(alpha, rank, default=1.0)
        U, S, Vh = leading_svd(site.weight().detach(), rank, keyed(seed, site.key))
        dtype = master_dtype(site)
        self.register_buffer("A", Vh.to(dtype).clone())
        self.register_buffer("L", (U * S).to(dtype))
        self.R = nn.Parameter(torch.zeros(rank, rank, dtype=dtype, device=Vh.device))

    def factors(self, site: Site) -> Factors:
        return Factors(self.A, self.L @ (self.scaling * self.R))

"""LoRA-XS: W' = W + s U S R V', U S V' the leading singular triplets of W.  Balazy et al. 2024, https://arxiv.org/abs/2405.17604

LoRA between frozen factors that W itself gives: only the small square R is trained. The paper starts R with noise of 1e-5;
here it starts at zero, from where it has a gradient too, so that the start is the base exactly.

Parameters: r^2 a layer, whatever its width.
State: R, and the frozen factors: their randomised decomposition is not repeated.
Cost: that of a LoRA of rank r, less the gradients of its factors; keeps r numbers a token for the backward. Merged: none.
Use: many adapters of one base, or little memory for moments.
Against: W can only change within its leading directions; what lies outside, which full fine-tuning does reach, cannot be learned.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.methods.base.delta import FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import check_rank, leading_svd
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
        alpha: s = alpha / r; s = 1 unless given
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        seed: draws the sketch of a large layer's decomposition
        """
        super().__init__()
        check_rank(rank, site.weight(), site.name)
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {dropout}")
        if alpha is not None and not 0 < alpha < math.inf:
            raise ConfigError(f"alpha must be a number above 0, not {alpha}")
        self.dropout, self.scaling = dropout, 1.0 if alpha is None else alpha / rank
        U, S, Vh = leading_svd(site.weight().detach(), rank, keyed(seed, site.name))
        dtype = master_dtype(site)
        self.register_buffer("A", Vh.to(dtype).clone())
        self.register_buffer("L", (U * S).to(dtype))
        self.R = nn.Parameter(torch.zeros(rank, rank, dtype=dtype, device=Vh.device))

    def factors(self, site: Site) -> Factors:
        return Factors(self.A, self.L @ (self.scaling * self.R))

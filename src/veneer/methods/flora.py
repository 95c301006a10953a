"""FLoRA: W' = W * (B A), number by number.  Wen & Chaudhuri 2023, https://arxiv.org/abs/2312.05677

y = sum_k b_k * W (a_k * x) + bias with the columns b_k of B and the rows a_k of A: one product with W for
every rank, in which every example may have its own A and B. At rank 1 these are gains of inputs and outputs
around one product, and the bank (veneer.bank) serves them row by row. Above rank 1 the bank computes products
for the rows with such an adapter.

Parameters: r (out + in) a layer.
State: A and B. The first row of A and column of B start at one, further columns of B at zero, further rows of
A at random
signs: the start is the base, and no two ranks are alike. (The paper starts with ones everywhere; then all
ranks stay equal for ever.)
Cost: two multiplications per number at rank 1. Above rank 1, r more products with W for few rows; for many
rows, W' - W is built in every pass and applied in one product, and built again in the backward; merged: none.
Use: rank 1, with another adapter for every example.
Against: cannot change a weight that is zero, and LoRA cannot express it: the two have different expressive
power. Above rank 1 it costs more than a batched LoRA of the same rank wherever products of small matrices run
at a fair speed (bench/bank.py has the paper's inequality beside the crossover). The paper's code takes the
mean over ranks, here it is the sum.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from veneer.methods.base.checks import check_free_rank
from veneer.methods.base.delta import DenseDelta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors, Products
from veneer.methods.base.protocols import GainsInput
from veneer.ops.draws import keyed
from veneer.sites import Site

# Up to 100 to 250 rows, r products with W cost less than building W' - W (r of 2 and 4, layers of 512 and
# 2048).
FEW_ROWS = 128


@final
class FLoRA(DenseDelta, GainsInput):
    """A (r, in), B (out, r)."""

    roles = {"A": "gain", "B": "gain"}

    def __init__(self, site: Site, *, rank: int = 1, seed: int = 0) -> None:
        """
        rank: r; above 1 it costs r products with W
        seed: key of the signs of further ranks, together with the layer's name
        """
        super().__init__()
        check_free_rank(rank, site)
        like = torch.empty((), dtype=master_dtype(site), device=site.weight().device)
        A, B = torch.ones(rank, site.in_), torch.zeros(site.out, rank)
        A[1:] = 2 * torch.randint(0, 2, (rank - 1, site.in_), generator=keyed(seed, site.key)) - 1
        B[:, 0] = 1
        self.A, self.B = nn.Parameter(A.to(like)), nn.Parameter(B.to(like))

    def factors(self, site: Site) -> Factors | None:
        if self.A.shape[0] > 1:
            return None
        A, B = self.A.new_empty(0, site.in_), self.B.new_empty(site.out, 0)
        return Factors(A, B, g=self.B.flatten(), c=self.A.flatten())

    def normal_form(self, site: Site) -> Factors | None:
        return self.factors(site) if site.kind in ROWWISE else None

    def products(self, site: Site) -> Products | None:
        """Returns products in which the layer's own output stands for the ones in a_1: exact if little has
        changed."""
        if self.A.shape[0] == 1 or site.kind not in ROWWISE:
            return None
        return Products(self.B[:, 0], torch.cat([self.A[:1] - 1, self.A[1:]]), self.B.mT)

    def delta(self, site: Site) -> Tensor:
        return site.weight().to(self.A.dtype) * (self.B @ self.A - 1)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        own = self.products(site)
        if own is None or x.numel() > FEW_ROWS * x.shape[-1]:
            return super().forward(x, y, site)
        shift, x, ones = site.shift(), x.to(y.dtype), (1,) * (x.ndim - 1)
        scaled = x * own.a.to(x.dtype).view(-1, *ones, x.shape[-1])  # (r, .., in)
        made = site.apply(scaled, site.weight().to(x.dtype))  # (r, .., out)
        change = (made * own.b.to(x.dtype).view(-1, *ones, y.shape[-1])).sum(0)
        return (own.g - 1).to(y.dtype) * (y if shift is None else y - shift) + change

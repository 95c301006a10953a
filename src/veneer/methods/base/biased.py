"""A change of a matrix together with a bias: y + change(x) + b."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.methods.base.protocols import Shifts
from veneer.sites import Site


@final
class Biased(Delta, Shifts):
    """inner: a change of the site's matrix; b (out,). Read from files of programs that train biases too."""

    def __init__(self, site: Site, inner: Delta, b: Tensor) -> None:
        super().__init__()
        self.inner, self.options, self.dropout = inner, inner.options, inner.dropout
        like = torch.empty(0, dtype=master_dtype(site), device=site.device)
        self.b = nn.Parameter(b.detach().to(like, copy=True))

    def factors(self, site: Site) -> Factors | None:
        return self.inner.factors(site)

    def delta(self, site: Site) -> Tensor:
        return self.inner.delta(site)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        change: Tensor = self.inner(x, y, site)
        return change + site.rows(self.b).to(y.dtype)

    def shift(self, site: Site) -> Tensor:
        return self.b

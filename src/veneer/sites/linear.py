"""nn.Linear, and transformers' Conv1D, which is a Linear with its weight stored (in, out)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.sites.base import Site


class LinearSite(Site):
    kind = "linear"

    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        self.module.weight.copy_(W)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        return x @ M.mT

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)


class TransposedSite(Site):
    kind = "transposed"

    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.mT

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        self.module.weight.copy_(W.mT)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        return x @ M.mT

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)

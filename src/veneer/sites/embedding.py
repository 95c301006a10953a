"""nn.Embedding: W is (dim, vocabulary) and x holds token ids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.sites.base import Site


class EmbeddingSite(Site):
    """The change of a scaled embedding (Gemma) is scaled as the layer scales its own output."""

    kind = "embedding"

    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.mT

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        self.module.weight.copy_(W.mT)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        h = F.embedding(x, M.mT, self.module.padding_idx)  # whose row takes no gradient, as in the base
        scale = getattr(self.module, "embed_scale", None)  # transformers' Gemma, BART
        return h if scale is None else h * torch.as_tensor(scale, dtype=h.dtype, device=h.device)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x  # token ids: there is nothing to drop

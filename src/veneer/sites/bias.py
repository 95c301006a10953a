"""The bias of a layer, whatever else the layer does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.errors import NotMergeable
from veneer.sites.base import Site


class BiasSite(Site):
    """Presents a layer's bias as W (n, 1). A linear map without bias reads as zeros and cannot be written."""

    kind = "bias"
    is_matrix = False

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.spatial = module.weight.ndim - 2 if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 0

    def weight(self) -> Tensor:
        bias = getattr(self.module, "bias", None)
        if bias is None:
            weight: Tensor = self.module.weight
            outputs = weight.shape[1] if isinstance(self.module, nn.Embedding) else weight.shape[0]
            return weight.new_zeros(outputs, 1)
        return bias[:, None]  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        if getattr(self.module, "bias", None) is None:
            raise NotMergeable(
                f"{self.name!r} has no bias to write to; keep the adapter, or leave layers without a bias out"
            )
        self.module.bias.copy_(W[:, 0])

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """Returns the addition of M (n, 1) to the layer's output; x plays no part."""
        return self.rows(M[:, 0])

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x

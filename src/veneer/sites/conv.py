"""nn.Conv1d, 2d and 3d: W is (out, in/groups * kernel); stride, dilation, groups and padding stay the layer's
own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.sites.base import Site


class ConvSite(Site):
    kind = "conv"

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.spatial = self.module.weight.ndim - 2
        self.factored = self.module.groups == 1  # a grouped convolution has no smaller one in front of it

    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight.flatten(1)

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        self.module.weight.copy_(W.view_as(self.module.weight))

    def pack(self, A: Tensor) -> Tensor:
        return A.reshape(-1, *self.module.weight.shape[1:])

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        layer = self.module
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        y: Tensor = conv(x, self.pack(M), None, layer.stride, padding, layer.dilation, layer.groups)
        return y

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)

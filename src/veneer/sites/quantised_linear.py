"""A linear layer whose W is kept in 8 or 4 bits a number and takes no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.ops import quant


class QuantisedLinear(nn.Module):
    """y = x W' + bias. The parts of W are parameters under the format's names, in the state dict as any
    others.

    Those of them with fractions have the dtype that the layer's weight would have, and follow model.to(dtype)
    as it would.
    """

    def __init__(
        self, parts: quant.Parts, shape: tuple[int, int], bias: nn.Parameter | None, format: quant.Format
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.format = format
        for name, part in zip(format.names, parts, strict=True):
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.bias = bias

    @property
    def parts(self) -> quant.Parts:
        """The tensors that W is kept as."""
        return tuple(
            getattr(self, name) for name in self.format.names
        )  # tensors that stand for parameters included

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the unpacked W."""
        return self.parts[-1].dtype

    @property
    def weight(self) -> Tensor:
        """Unpacks W (out, in) on every access: for readers of a layer's weight, not for products."""
        return self.format.unpack(self.parts, self.shape, self.dtype)

    @torch.no_grad()
    def write(self, W: Tensor) -> None:
        """Packs another W (out, in) in the old one's place."""
        for part, new in zip(self.parts, self.format.pack(W.to(self.parts[0].device)), strict=True):
            part.copy_(new)

    def forward(self, x: Tensor) -> Tensor:
        y = quant.product(x, self.parts, self.format, self.shape)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, format={self.format.name}"

"""Matrix forms of a layer's weight, and the pairs of layers that a low rank of the form is factored into.

channel: W (N, C kh kw) becomes a convolution to r channels, with the layer's stride and padding, and a 1 x 1
one.
spatial: W (C kh, N kw) becomes a (kh, 1) convolution and a (1, kw) one, each with its own axis of stride and
padding.
Jaderberg et al. 2014 (https://arxiv.org/abs/1405.3866); Xu et al. 2020 (https://arxiv.org/abs/2004.14566),
section 3.
Linear layers have one form, W (out, in).

"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from veneer.sites.factored.layers import holding


class FactoredConv(nn.Sequential):
    """Two convolutions in place of one; each is a layer that adapters find."""


class Form(ABC):
    """A layer's weight as a matrix (m, n), there and back."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        W: Tensor = self.layer.weight
        return W

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """Returns the weight, or a tensor of its shape such as its momentum, as a matrix (m, n)."""

    @abstractmethod
    def tensor(self, M: Tensor) -> Tensor:
        """Returns a matrix (m, n) in the weight's shape."""

    @abstractmethod
    def factored(self, A: Tensor, B: Tensor) -> nn.Module:
        """Returns the pair of layers that holds B A for A (r, n) and B (m, r)."""

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.matrix(self.weight.detach()).shape
        return m, n

    def put(self, M: Tensor) -> None:
        """Writes a matrix (m, n) into the layer."""
        with torch.no_grad():
            self.weight.copy_(self.tensor(M))


class LinearForm(Form):
    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def tensor(self, M: Tensor) -> Tensor:
        return M

    def factored(self, A: Tensor, B: Tensor) -> nn.Module:
        bias = self.layer.bias
        made = holding("plain", A, B, None if bias is None else bias.detach())
        return made.requires_grad_(True)


class ChannelForm(Form):
    """NC: rows are output channels."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def tensor(self, M: Tensor) -> Tensor:
        return M.reshape(self.weight.shape)

    def factored(self, A: Tensor, B: Tensor) -> nn.Module:
        old, r = self.layer, len(A)
        shape = (old.stride, old.padding, old.dilation)
        first = _conv(old, A.reshape(r, *old.weight.shape[1:]), *shape, None)
        one = (1,) * (old.weight.ndim - 2)
        last = _conv(old, B.reshape(len(B), r, *one), one, 0, 1, old.bias, zeros=True)
        return FactoredConv(first, last)


class SpatialForm(Form):
    """VH: rows are input channels by height, columns are output channels by width."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.permute(1, 2, 0, 3).reshape(weight.shape[1] * weight.shape[2], -1)

    def tensor(self, M: Tensor) -> Tensor:
        N, C, kh, kw = self.weight.shape
        return M.reshape(C, kh, N, kw).permute(2, 0, 1, 3)

    def factored(self, A: Tensor, B: Tensor) -> nn.Module:
        """B (C kh, r) makes the vertical convolution, A (r, N kw) the horizontal one."""
        old, r = self.layer, len(A)
        N, C, kh, kw = old.weight.shape
        sh, sw = old.stride
        dh, dw = old.dilation
        ph, pw = _paddings(old)
        vertical = B.reshape(C, kh, r).permute(2, 0, 1)[..., None]
        horizontal = A.reshape(r, N, kw).permute(1, 0, 2)[:, :, None]
        first = _conv(old, vertical, (sh, 1), (ph, 0), (dh, 1), None)
        last = _conv(old, horizontal, (1, sw), (0, pw), (1, dw), old.bias)
        return FactoredConv(first, last)


def _paddings(conv: Any) -> tuple[int, int]:
    """The padding of a convolution above and beside; "same" as numbers."""
    if isinstance(conv.padding, str):
        sides = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return (sides[0], sides[1]) if conv.padding == "same" else (0, 0)
    return conv.padding  # type: ignore[no-any-return]


def _conv(
    old: Any, weight: Tensor, stride: Any, padding: Any, dilation: Any, bias: Any, zeros: bool = False
) -> nn.Module:
    """A convolution of the old one's kind with this weight."""
    made = type(old)(
        weight.shape[1],
        weight.shape[0],
        weight.shape[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=bias is not None,
        padding_mode="zeros" if zeros else old.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made.train(old.training)  # type: ignore[no-any-return]


def form_of(layer: nn.Module, kind: str) -> Form | None:
    """Returns the form of a layer for a kind, channel or spatial; None for layers that have no low rank to
    gain.

    Grouped convolutions, and "same" padding of an even kernel in the spatial form, are such.
    """
    if type(layer) is nn.Linear:
        return LinearForm(layer)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer.groups > 1:
        return None
    if kind == "spatial" and type(layer) is nn.Conv2d and _is_even(layer):
        return SpatialForm(layer)
    return ChannelForm(layer)


def _is_even(conv: nn.Conv2d) -> bool:
    """True if the padding is the same on both sides of each axis, and a kernel has more than one row and
    column.
    """
    symmetric = conv.padding != "same" or all(k % 2 for k in conv.kernel_size)
    return symmetric and min(conv.kernel_size) > 1

"""A site: the place where a model holds a linear map, whatever layer stores it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Site(ABC):
    """A linear map W (out, in) held by `module`, called `name` in its model.

    A method sees this and nothing else of the layer. Channels are the last dimension of the layer's output,
    or dimension 1 followed by `spatial` dimensions.
    """

    kind: ClassVar[str]
    module: Any  # the layer, whose attributes depend on its class
    spatial: int = 0
    is_matrix: ClassVar[bool] = (
        True  # whether W is a linear map of the layer's input, which other matrices can take the place of
    )
    acts_by_hook: ClassVar[bool] = True  # whether a change is added to the layer's output by a hook on it
    swaps_weights: ClassVar[bool] = False  # True if a change acts by running the module with other weights
    is_packed: ClassVar[bool] = (
        False  # whether W is kept in a format of few bits, from which it is unpacked when asked for
    )
    factored: bool = True  # whether apply() takes a matrix with any number of rows

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.key = name  # of random draws, together with a seed; other adapters of the layer get another one
        self.out, self.in_ = self.weight().shape

    @abstractmethod
    def weight(self) -> Tensor:
        """W (out, in): a view where the layer allows it."""

    @abstractmethod
    def set_weight(self, W: Tensor) -> None:
        """Writes W (out, in) into the layer in the layer's dtype: the only writer of the base."""

    @abstractmethod
    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """The layer's own operation on x with M (k, in) in place of W and no bias."""

    @abstractmethod
    def drop(self, x: Tensor, p: float) -> Tensor:
        """x with dropout, or x itself where the layer's input cannot be dropped."""

    def stored(self, W: Tensor) -> Tensor:
        """W (out, in) as it would be if it were written into the layer: rounded to what the layer can
        hold."""
        return W.to(self.dtype)

    @property
    def host(self) -> nn.Module:
        """The module of the model that holds W."""
        module: nn.Module = self.module
        return module

    @property
    def dtype(self) -> torch.dtype:
        """W's."""
        return self.weight().dtype

    @property
    def device(self) -> torch.device:
        """Where W lies."""
        return self.weight().device

    @property
    def trains(self) -> bool:
        """Returns True if the layer's own parameters take gradients."""
        return any(p.requires_grad for p in self.module.parameters(recurse=False))

    def stamp(self) -> tuple[Any, ...] | None:
        """Returns a value that changes when W is written to or replaced, or None under a tracer.

        Casts and moves do not count as writes; writes through `.data` are not seen.
        """
        own = list(self.module.parameters(recurse=False))
        if not all(type(p) is nn.Parameter for p in own):
            return None
        return tuple((id(p), -1 if p.is_inference() else p._version) for p in own)

    def mix(self, h: Tensor, B: Tensor) -> Tensor:
        """A mix of channels of apply's output: k -> out by B (out, k)."""
        if self.spatial == 0:
            return h @ B.mT
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]
        mixed: Tensor = conv(h, B[(...,) + (None,) * self.spatial])
        return mixed

    def rows(self, v: Tensor) -> Tensor:
        """v (out,), one number an output channel, shaped to act on the layer's output."""
        return v.view(-1, *(1,) * self.spatial)

    def shift(self) -> Tensor | None:
        """The bias shaped to act on the layer's output, or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else self.rows(bias)

    def pack(self, A: Tensor) -> Tensor:
        """A (k, in) in the shape that the layer's own weight has: (k, in, kernel..) for a convolution."""
        return A

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.out} x {self.in_})"

"""The interface of a storage format, and int8: one scale for each row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from veneer.ops.lowrank import is_traced

Parts = tuple[Tensor, ...]
TINY = torch.finfo(torch.float32).tiny


class Format(ABC):
    """A storage format of W (out, in) as tensors; `names` are their names, in order."""

    name: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def pack(self, W: Tensor) -> Parts:
        """Packs W (out, in); on the meta device only the shapes."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Returns W (out, in) unpacked, rounded to dtype."""

    def times(self, x: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """Returns x W': x (.., in) -> (.., out)."""
        return x @ self.unpack(parts, shape, x.dtype).mT

    def times_transposed(self, dy: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """Returns dy W: dy (.., out) -> (.., in)."""
        return dy @ self.unpack(parts, shape, dy.dtype)


class Int8(Format):
    """codes (out, in) in int8; absmax (out,) in W's dtype but with bfloat16's digits."""

    name = "int8"
    names = ("codes", "absmax")

    def pack(self, W: Tensor) -> Parts:
        absmax = W.float().abs().amax(1).bfloat16().float()
        codes = (W.float() * (127 / absmax.clamp_min(TINY))[:, None]).round_().clamp_(-127, 127)
        return codes.to(torch.int8), absmax.to(W.dtype)

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, absmax = parts
        wide = torch.promote_types(dtype, torch.float32)
        return (codes.to(wide) * _steps(absmax).to(wide)[:, None]).to(dtype)

    def times(self, x: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        if x.dtype == torch.float16:  # whose sums of codes could overflow
            return super().times(x, parts, shape)
        codes, steps = parts[0], _steps(parts[1]).to(x.dtype)
        if x.numel() == shape[1] and x.dtype == torch.bfloat16 and x.device.type == "cpu" and not is_traced():
            # One vector, as in generation: torch's own product reads the codes directly.
            return torch._weight_int8pack_mm(x.reshape(1, -1), codes, steps).view(*x.shape[:-1], -1)
        return (x @ codes.to(x.dtype).mT).mul_(steps)

    def times_transposed(self, dy: Tensor, parts: Parts, shape: tuple[int, int]) -> Tensor:
        if dy.dtype == torch.float16:
            return super().times_transposed(dy, parts, shape)
        return (dy * _steps(parts[1]).to(dy.dtype)) @ parts[0].to(dy.dtype)


def _steps(absmax: Tensor) -> Tensor:
    """Returns the value of a code of 1 in each row (out,), in float32."""
    return absmax.float() / 127

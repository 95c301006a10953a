"""Linear layers whose weight is kept in few bits: our own, bitsandbytes' of 4 and 8 bits, and torchao's of 8.

W is what the layer computes with: the unpacked weight. Writing to it packs again, which rounds to the format;
`stored` tells beforehand what would be left. bitsandbytes and torchao are asked for by the names of their
types and imported when used; they are not part of the tests' environment;
tests/compress/test_quant_libraries.py passed with bitsandbytes 0.50.2 and torchao 0.18.0 on a CPU.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import NotMergeable
from veneer.ops import quant
from veneer.sites.base import Site
from veneer.sites.quantised_linear import QuantisedLinear


class PackedSite(Site):
    """Base of the packed layers: methods treat each as a Linear."""

    kind = "linear"
    is_packed: ClassVar[bool] = True

    @abstractmethod
    def stored(self, W: Tensor) -> Tensor: ...

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        return x @ M.mT

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)


class QuantisedSite(PackedSite):
    """Our own layer."""

    def weight(self) -> Tensor:
        W: Tensor = self.module.weight
        return W

    def set_weight(self, W: Tensor) -> None:
        self.module.write(W.to(self.dtype))

    def stored(self, W: Tensor) -> Tensor:
        return quant.rounded(W.to(self.dtype), self.module.format)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.module.parts[0].device  # type: ignore[no-any-return]


class FourBitSite(PackedSite):
    """bitsandbytes' Linear4bit, nf4 or fp4, which on a CPU may lay its weight out in another way after a
    call."""

    def weight(self) -> Tensor:
        from bitsandbytes import functional

        codes, state = self.module.weight.data, self.module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        W: Tensor = functional.dequantize_4bit(codes, state)
        return W

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        self.module.weight.data, self.module.weight.quant_state = self._pack(W)
        self.module.quant_state = self.module.weight.quant_state

    def stored(self, W: Tensor) -> Tensor:
        from bitsandbytes import functional

        found: Tensor = functional.dequantize_4bit(*self._pack(W))
        return found

    def _pack(self, W: Tensor) -> tuple[Tensor, Any]:
        from bitsandbytes import functional

        own = self.module.weight
        settings = dict(
            quant_type=own.quant_type,
            quant_storage=own.quant_storage,
            compress_statistics=own.compress_statistics,
        )
        found: tuple[Tensor, Any] = functional.quantize_4bit(
            W.to(own.quant_state.dtype).contiguous(), blocksize=own.blocksize, **settings
        )
        return found


class EightBitSite(PackedSite):
    """bitsandbytes' Linear8bitLt with int8 weights; W in float32, as the layer has no dtype of its own."""

    def weight(self) -> Tensor:
        codes, absmax = self._parts()
        W: Tensor = codes.float() * (absmax.float() / 127)[:, None]
        return W

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        from bitsandbytes import functional

        for old, new in zip(self._parts(), functional.int8_vectorwise_quant(W.half())[:2], strict=True):
            old.copy_(new)

    def stored(self, W: Tensor) -> Tensor:
        from bitsandbytes import functional

        codes, absmax, _ = functional.int8_vectorwise_quant(W.half())
        found: Tensor = codes.float() * (absmax / 127)[:, None]
        return found

    def _parts(self) -> tuple[Tensor, Tensor]:
        """CB and SCB, which the first forward pass moves from the weight to the layer's state."""
        holder = self.module.state if self.module.weight.CB is None else self.module.weight
        return holder.CB, holder.SCB


class TorchaoSite(PackedSite):
    """torchao's weight of 8 bits, one scale a row or a group of columns; written to where it is one a row."""

    def weight(self) -> Tensor:
        W: Tensor = self.module.weight.dequantize()
        return W

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        self.module.weight = nn.Parameter(self._pack(W), requires_grad=False)

    def stored(self, W: Tensor) -> Tensor:
        found: Tensor = self._pack(W).dequantize()
        return found

    def _pack(self, W: Tensor) -> Any:
        from torchao.quantization import PerRow

        own = self.module.weight
        if list(own.block_size) != [1, self.in_] or (own.zero_point is not None and own.zero_point.any()):
            raise NotMergeable(
                f"{self.name!r}: torchao's weight is packed again here where it has one scale a row;"
                f" dequantise the layer"
            )
        return type(own).from_hp(W.to(own.dtype), granularity=PerRow(), act_quant_kwargs=own.act_quant_kwargs)


# (package, type of the weight) -> site
WEIGHTS: dict[tuple[str, str], type[PackedSite]] = {
    ("bitsandbytes", "Params4bit"): FourBitSite,
    ("bitsandbytes", "Int8Params"): EightBitSite,
    ("torchao", "Int8Tensor"): TorchaoSite,
}


def packed_kind(module: nn.Module) -> type[PackedSite] | None:
    """The site of a layer whose weight is packed in a way known here, or None."""
    if isinstance(module, QuantisedLinear):
        return QuantisedSite
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or weight is None:
        return None
    kind = _by_type(weight)
    whole = (
        kind is not TorchaoSite and weight.is_floating_point()
    )  # bitsandbytes packs when the layer is moved to its device
    return None if whole else kind


def _by_type(weight: Tensor) -> type[PackedSite] | None:
    return WEIGHTS.get((type(weight).__module__.split(".")[0], type(weight).__name__))


def plain(weight: Tensor) -> Tensor:
    """Returns a parameter as a plain tensor: torchao's unpacked, others unchanged."""
    found: Tensor = weight.dequantize() if _by_type(weight) is TorchaoSite else weight
    return found


def formats(model: nn.Module) -> dict[str, str]:
    """Returns the formats of layers packed by veneer.quantise, by layer name; empty for a plain model."""
    return {n: m.format.name for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}

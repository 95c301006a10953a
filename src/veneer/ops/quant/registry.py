"""The formats by their names."""

from __future__ import annotations

from torch import Tensor

from veneer.errors import ConfigError, suggest
from veneer.ops.quant.formats import Format, Int8
from veneer.ops.quant.nf4 import NF4
from veneer.ops.quant.spqr import SpQR

FORMATS: dict[str, Format] = {f.name: f for f in (Int8(), NF4(), SpQR())}


def get(name: str) -> Format:
    """Returns the format `name`. Raises ConfigError for an unknown one."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r} of quantised weights{suggest(name, FORMATS)}")
    return FORMATS[name]


def rounded(W: Tensor, format: Format) -> Tensor:
    """Returns W (out, in) packed and unpacked again, in W's dtype."""
    out, in_ = W.shape
    return format.unpack(format.pack(W), (out, in_), W.dtype)

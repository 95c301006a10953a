"""Matrices in 8 or 4 bits per number, and products that keep no unpacked matrix for the backward.

int8: w ~ c a / 127 with whole c in [-127, 127] and one a, the largest |w|, for each row: 8 bits a number.
nf4: w ~ L[c] a with 16 levels L, the quantiles of a normal distribution in [-1, 1] with an exact 0, and one a
for each block of 64 numbers; the a's are kept in 8 bits themselves, in blocks of 256 with one float32 each
(double quantisation): 4.127 bits a number.  Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314,
sections 2 and 3.

What differs from the paper: a = a_max 2^(-k/24), k in 0..255, where the paper keeps a in 8-bit floats after
taking their mean off; a is within 1.5 % of the block's largest number wherever that is above a 1500th of
a_max, so that one row of outliers does not spoil the blocks beside it. A level is chosen for the a that is
kept, and the a's are such that packing what was unpacked gives the same bytes.

Cost of a product: the matrix is unpacked once forward and once backward, in the dtype of x, and forgotten;
int8's a is multiplied into the product and not into the matrix. Error in W, of normal numbers: int8 0.8 %,
nf4 9 %.
Use: int8 halves a bfloat16 base at little cost, nf4 takes nearly a quarter. Against: without a kernel of its
own nf4 costs more time than it saves in memory traffic; small layers and embeddings suffer most, and are left
out by `veneer.quantise`.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from veneer.errors import ConfigError, suggest
from veneer.ops.lowrank import is_traced, refuse_second_order

Parts = tuple[Tensor, ...]
BLOCK, GROUP = 64, 256  # numbers that share an a; a's that share a float32
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


def _levels() -> tuple[float, ...]:
    """Returns NF4's 16 levels: 8 quantiles above 0, 7 below, and 0 (QLoRA, section 3 and appendix E)."""
    tail = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(tail, 0.5, n, dtype=torch.float64))[:-1] for n in (9, 8)
    )
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return tuple((levels / levels.abs().max()).float().tolist())


def _between(values: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the midpoints between neighbouring values."""
    return tuple((a + b) / 2 for a, b in itertools.pairwise(values))


LEVELS = _levels()
PAIRS = tuple((a, b) for a in LEVELS for b in LEVELS)  # the two numbers of every byte
SHARES = tuple(2 ** (-k / 24) for k in range(256))  # of a_max


class NF4(Format):
    """codes (n / 2,) in uint8, two numbers each; absmax (blocks,) in uint8; largest (groups,) in W's dtype,
    with bfloat16's digits."""

    name = "nf4"
    names = ("codes", "absmax", "largest")

    def pack(self, W: Tensor) -> Parts:
        blocks = _padded(W.float().reshape(-1), BLOCK)  # (blocks, 64)
        absmax = _padded(blocks.abs().amax(1), GROUP)  # (groups, 256)
        largest = absmax.amax(1).bfloat16().float()
        rising = torch.tensor(_between(SHARES[::-1]), device=W.device)
        shares = 255 - torch.bucketize(absmax / largest.clamp_min(TINY)[:, None], rising, out_int32=True)
        kept = shares.to(torch.uint8).view(-1)[: len(blocks)]
        scales = _scales(kept, largest).clamp_min(TINY)
        codes = torch.bucketize(
            blocks / scales[:, None], torch.tensor(_between(LEVELS), device=W.device), out_int32=True
        )
        pairs = codes.to(torch.uint8).view(-1, 2)
        return pairs[:, 0] * 16 + pairs[:, 1], kept, largest.to(W.dtype)

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, absmax, largest = parts
        # Two float32 looked up as one number of 64 bits: half as many look-ups, which are what this costs.
        table = torch.tensor(PAIRS, dtype=torch.float32, device=codes.device).view(torch.int64).view(-1)
        blocks = table.index_select(0, codes.int()).view(torch.float32).view(-1, BLOCK)
        W = blocks.mul_(_scales(absmax, largest)[:, None])
        return W.view(-1)[: math.prod(shape)].view(shape).to(dtype)


def _padded(flat: Tensor, size: int) -> Tensor:
    """Returns flat (n,) padded with zeros as (n / size rounded up, size)."""
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _scales(absmax: Tensor, largest: Tensor) -> Tensor:
    """Returns the scale a (blocks,) of every block of nf4, in float32."""
    shares = torch.tensor(SHARES, dtype=torch.float32, device=absmax.device).index_select(0, absmax.int())
    return shares * largest.float().repeat_interleave(GROUP)[: len(shares)]


FORMATS: dict[str, Format] = {f.name: f for f in (Int8(), NF4())}


def get(name: str) -> Format:
    """Returns the format `name`. Raises ConfigError for an unknown one."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r} of quantised weights{suggest(name, FORMATS)}")
    return FORMATS[name]


def rounded(W: Tensor, format: Format) -> Tensor:
    """Returns W (out, in) packed and unpacked again, in W's dtype."""
    out, in_ = W.shape
    return format.unpack(format.pack(W), (out, in_), W.dtype)


def product(x: Tensor, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
    """Returns x W' for a packed W (out, in): x (.., in) -> (.., out) in x's dtype.

    Only the packed W is kept for the backward; it takes no gradient.
    """
    if torch.compiler.is_compiling():
        made: Tensor = _times(x, list(parts), format.name, *shape)
        return made
    if is_traced():
        return format.times(x, parts, shape)
    y: Tensor = _Product.apply(x, format, shape, *parts)
    return y


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Format, shape: tuple[int, int], *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.format, ctx.shape = format, shape
        return format.times(x, parts, shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        parts = ctx.saved_tensors  # read once: gradient checkpointing forbids a second read
        dx = ctx.format.times_transposed(dy, parts, ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, *(None for _ in parts)


# For the compiler both products are operations that it does not look into: it would keep the unpacked matrix
# for the backward.
PACKED = "Tensor[] parts, str format, SymInt out, SymInt in_"


def _forward(x: Tensor, parts: list[Tensor], format: str, out: int, in_: int) -> Tensor:
    return get(format).times(x, tuple(parts), (out, in_))


def _backward(dy: Tensor, parts: list[Tensor], format: str, out: int, in_: int) -> Tensor:
    return get(format).times_transposed(dy, tuple(parts), (out, in_))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, *ctx.how = inputs
    ctx.save_for_backward(*parts)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    parts = list(ctx.saved_tensors)
    dx = _times_transposed(dy, parts, *ctx.how) if ctx.needs_input_grad[0] else None
    return dx, [None for _ in parts], None, None, None


_times = torch.library.custom_op(
    "veneer::times_packed", _forward, mutates_args=(), schema=f"(Tensor x, {PACKED}) -> Tensor"
)
_times_transposed = torch.library.custom_op(
    "veneer::times_packed_transposed", _backward, mutates_args=(), schema=f"(Tensor dy, {PACKED}) -> Tensor"
)
_times.register_fake(lambda x, parts, format, out, in_: x.new_empty(*x.shape[:-1], out))
_times_transposed.register_fake(lambda dy, parts, format, out, in_: dy.new_empty(*dy.shape[:-1], in_))
_times.register_autograd(_gradient, setup_context=_keep)

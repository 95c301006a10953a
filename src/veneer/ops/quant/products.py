"""Products with packed matrices, of which only the packed one is kept for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.lowrank import is_traced, refuse_second_order
from veneer.ops.quant.formats import Format, Parts
from veneer.ops.quant.registry import get


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

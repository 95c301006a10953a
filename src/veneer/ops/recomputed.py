"""Multiplies x by a matrix that is built in the forward, dropped, and rebuilt in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.lowrank import is_traced, refuse_second_order


def product(x: Tensor, make: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Returns x D' for D = make(*tensors): x (.., in), D (out, in) -> (.., out), D in x's dtype.

    Only x and the tensors are kept for the backward. Other tensors that `make` reads take no gradient. Under
    compilation the compiler decides what is kept.
    """
    if is_traced():
        return x @ make(*tensors).mT
    y: Tensor = _Product.apply(x, make, *tensors)
    return y


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        needs_x = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if needs_x else None, *tensors)
        ctx.make = make
        return x @ make(*tensors).mT

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        x, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            own = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
            D = ctx.make(*own)
        dx = dy @ D.detach() if ctx.needs_input_grad[0] else None
        if not any(wanted):
            return dx, None, *(None for _ in own)
        dD = dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])  # (out, in)
        found = iter(torch.autograd.grad(D, [t for t in own if t.requires_grad], dD))
        return dx, None, *(next(found) if w else None for w in wanted)

"""Changes of W that are affine in its square tiles, and x times such a change without keeping it for the backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from veneer.ops.lowrank import is_traced, refuse_second_order


def affine(W: Tensor, B: Tensor) -> Tensor:
    """W_ij B_i + B_i at every tile: W (out, in), B (out / r, r, r) -> (out, in)."""
    n, r, _ = B.shape
    tiles = W.reshape(n, -1, r)  # (rows of tiles, r * columns of tiles, r): every row of a tile on its own
    change = (tiles @ B).view(n, r, -1, r) + B[:, :, None]
    return change.reshape(W.shape)


def product(x: Tensor, W: Tensor, B: Tensor) -> Tensor:
    """x times affine(W, B)': x (.., in) -> (.., out). W takes no gradient."""
    if is_traced():
        return x @ affine(W.detach().to(x.dtype), B.to(x.dtype)).mT
    y: Tensor = _Product.apply(x, W.detach(), B)
    return y


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, B)
        return x @ affine(W.to(x.dtype), B.to(x.dtype)).mT

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        x, W, B = ctx.saved_tensors
        W = W.to(dy.dtype)
        dx = dy @ affine(W, B.to(dy.dtype)) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return dx, None, None
        n, r, _ = B.shape
        D = dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(
            -1, x.shape[-1]
        )  # (out, in): the gradient of the change
        dB = W.reshape(n, -1, r).mT @ D.view(n, -1, r) + D.view(n, r, -1, r).sum(2)
        return dx, None, dB.to(B.dtype)

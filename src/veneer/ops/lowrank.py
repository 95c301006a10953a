"""y + (x A') B' in two steps that keep only x and h = x A' for the backward and cast factors once.

Several layers that read one x share the first step: one product with their factors stacked, and one for dx.
Under compilation the same formulas are written plainly: there the compiler decides what is kept, and fuses
more than these do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def project(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns x A' for every A: x (..., in), A (r, in) each -> (..., r) each, in x's dtype."""
    if is_traced():
        ranks = [A.shape[0] for A in factors]
        h = x @ _stack(factors, x.dtype).mT
        return tuple(torch.split(h, ranks, -1))
    hs: tuple[Tensor, ...] = _Project.apply(x, *factors)
    return hs


def expand(y: Tensor, h: Tensor, B: Tensor, *, writable: bool = False) -> Tensor:
    """Returns y + h B': y (..., out), h (..., r), B (out, r).

    writable: y belongs to the caller, and nobody else reads it before this changes it; the sum is then made
    in place where autograd allows that.
    """
    if is_traced():
        return y + h @ B.to(h.dtype).mT
    total: Tensor = _Expand.apply(y, h, B, writable and in_place(y))
    return total


def in_place(y: Tensor) -> bool:
    """Returns True if a sum may be written into y; autograd forbids writing into a view."""
    return y.is_contiguous() and not (torch.is_grad_enabled() and y._is_view())


def is_traced() -> bool:
    """Returns True under compilation, tracing or a functorch transform, which need ordinary operations."""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    )


def _stack(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (factors[0] if len(factors) == 1 else torch.cat(list(factors))).to(dtype)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def refuse_second_order() -> None:
    """Raises RuntimeError in a backward that is itself to be differentiated, as what was kept is not enough
    for that."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "derivatives of second order (create_graph=True) are not supported by Veneer's low-rank product"
            " and"
            " chunked loss; use torch.func.grad or hessian, and causal_lm.loss(.., chunked=False)"
        )


class _Project(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        A = _stack(factors, x.dtype)  # (sum of ranks, in)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, A)  # frozen factors need no x
        ctx.set_materialize_grads(False)
        ctx.ranks, ctx.dtypes = [f.shape[0] for f in factors], [f.dtype for f in factors]
        return tuple(torch.split(x @ A.mT, ctx.ranks, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        x, A = ctx.saved_tensors
        like = next((g for g in grads if g is not None), None)
        if like is None:
            return None, *(None for _ in grads)
        parts = [
            like.new_zeros(*like.shape[:-1], r) if g is None else g
            for g, r in zip(grads, ctx.ranks, strict=True)
        ]
        dh = parts[0] if len(parts) == 1 else torch.cat(parts, -1)  # (.., sum of ranks)
        dx = dh @ A if ctx.needs_input_grad[0] else None
        wanted = [n and g is not None for n, g in zip(ctx.needs_input_grad[1:], grads, strict=True)]
        if not any(wanted):
            return dx, *(None for _ in wanted)
        own = (_rows(dh).mT @ _rows(x)).split(ctx.ranks)
        return dx, *(d.to(t) if n else None for d, t, n in zip(own, ctx.dtypes, wanted, strict=True))


class _Expand(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, in_place: bool) -> Tensor:
        narrow = B.to(h.dtype)
        ctx.save_for_backward(h, narrow)
        ctx.dtype = B.dtype
        if in_place:
            y.view(-1, y.shape[-1]).addmm_(_rows(h), narrow.mT)
            ctx.mark_dirty(y)
            return y
        # A view made here could not be modified in place, as Falcon does with its layers' outputs.
        out: Tensor = torch.ops.aten._unsafe_view(torch.addmm(_rows(y), _rows(h), narrow.mT), y.shape)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        h, B = ctx.saved_tensors
        dh = dy @ B if ctx.needs_input_grad[1] else None
        dB = (_rows(dy).mT @ _rows(h)).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return (dy if ctx.needs_input_grad[0] else None), dh, dB, None

"""Causal attention within documents of a packed row, computed document by document on a CPU.

With a mask the whole square of a row is computed, and every layer reads a number for every pair of positions;
here it is a square for each document. To compilers each direction is one operation, as the documents of every
batch are others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from veneer.ops.attention.alike import alike
from veneer.ops.lowrank import refuse_second_order

# Positions from which on the fused backward is as fast as products in bfloat16; in float32 it is faster at
# all lengths.
FUSED = 384


def attend_within(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *, scale: float) -> Tensor:
    """Attends from a document's start to the own position: (b, heads, t, d) each -> (b, heads, t, d).

    starts: (b, t), where each position's document begins.
    """
    q, k, v = alike(q, k, v)
    out: Tensor = _documents(q, k, v, starts, scale)[0]
    return out


def as_mask(starts: Tensor) -> Tensor:
    """Returns a mask (b, 1, t, t), True at visible positions."""
    place = torch.arange(starts.shape[-1], device=starts.device)
    return ((place <= place[:, None]) & (place >= starts[..., None]))[:, None]


def _spans(starts: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields (row, positions) of every document."""
    t = starts.shape[1]
    first = (starts == torch.arange(t)).nonzero().tolist()
    for (row, begin), (after, end) in zip(first, [*first[1:], [-1, t]], strict=True):
        yield slice(row, row + 1), slice(begin, end if after == row else t)


@torch.library.custom_op("veneer::documents", mutates_args=())
def _documents(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, total = _empty(q)
    for row, own in _spans(starts):
        part = (t[row, :, own] for t in (q, k, v))
        out[row, :, own], total[row, :, own] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *part, 0.0, True, scale=scale
        )
    return out, total


@_documents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty(q)


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates the output, laid out (b, t, heads, d), and the log-sums (b, heads, t)."""
    b, heads, t, d = q.shape
    return q.new_empty(b, t, heads, d).transpose(1, 2), q.new_empty(b, heads, t, dtype=torch.float32)


@torch.library.custom_op("veneer::documents_backward", mutates_args=())
def _documents_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty(q)[0] for _ in range(3))
    for row, own in _spans(starts):
        part = [t[row, :, own] for t in (do, q, k, v, out, total)]
        fused = q.dtype != torch.bfloat16 or part[0].shape[2] > FUSED
        dq[row, :, own], dk[row, :, own], dv[row, :, own] = (_by_kernel if fused else _by_products)(
            *part, scale=scale
        )
    return dq, dk, dv


@_documents_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q)[0], _empty(q)[0], _empty(q)[0]


def _by_kernel(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, out, total, 0.0, True, scale=scale
    )
    return found  # type: ignore[no-any-return, unused-ignore]


def _by_products(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    t = q.shape[-2]
    later = torch.ones(t, t, dtype=torch.bool).triu_(1)
    # (1, heads, t, t)
    p = (q @ k.mT).float().mul_(scale).sub_(total[..., None]).masked_fill_(later, -torch.inf).exp_()
    inner = (do.float() * out).sum(-1, keepdim=True)
    ds = (do @ v.mT).float().sub_(inner).mul_(p).mul_(scale).to(q.dtype)
    return ds @ k, ds.mT @ q, p.to(q.dtype).mT @ do


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, do: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    refuse_second_order()
    q, k, v, out, total, starts = ctx.saved_tensors
    return *_documents_backward(do, q, k, v, out, total, starts, ctx.scale), None, None


_documents.register_autograd(_backward, setup_context=_keep)

"""Attention for short sequences on a CPU: the fused kernel forward, batched products backward.

PyTorch's fused backward on CPUs costs three times what its products do at a few hundred positions; the
probabilities, which make this grow with the square of the length, are small then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.attention.alike import alike
from veneer.ops.lowrank import refuse_second_order

LONGEST = 384  # positions: from 512 on PyTorch's own backward is as fast
HALVED = 64  # positions: from here on two parts are faster than one with a quarter of zeros


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Returns softmax(scale q k' + mask) v: (b, heads, t, d) each -> (b, heads, t, d); causal without a mask.

    mask: (b or 1, heads or 1, t, t), True where a position may look, in every row at least once.
    """
    q, k, v = alike(q, k, v)
    out: Tensor = _Attention.apply(q, k, v, scale, mask)
    return out


def suits(q: Tensor, k: Tensor) -> bool:
    """Returns True if `attend` supports these: on a CPU, in training, short, without a cache."""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return training and q.device.type == "cpu" and q.shape[-2] == k.shape[-2] and 1 < q.shape[-2] <= LONGEST


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        bias = (
            None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        )
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, total, mask)
        ctx.scale = scale
        return out  # type: ignore[no-any-return, unused-ignore]

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        q, k, v, out, total, mask = ctx.saved_tensors
        inner = (do.to(total.dtype) * out).sum(-1, keepdim=True)
        rows = _Rows(q, do, total[..., None], inner)
        if mask is not None or q.shape[-2] < HALVED:
            steps = torch.arange(q.shape[-2], device=q.device)
            may = steps[:, None] >= steps if mask is None else mask
            return *_gradients(rows, k, v, ctx.scale, may), None, None
        return *_causal_gradients(rows, k, v, ctx.scale), None, None


class _Rows(NamedTuple):
    """Queries with the output's gradient (b, heads, rows, d), log of the sum and inner product (.., 1)."""

    q: Tensor
    do: Tensor
    total: Tensor
    inner: Tensor

    def past(self, start: int) -> _Rows:
        return _Rows(*(x[..., start:, :] for x in self))


def _causal_gradients(rows: _Rows, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Returns the gradients of q, k and v by halves of the keys; no row of the first half sees the second.

    A quarter of (t, t) is left out that way. The two parts of q's gradient are summed in the precision of the
    rows' totals.
    """
    t = k.shape[-2]
    half, steps = t // 2, torch.arange(t, device=k.device)
    may = steps[:, None] >= steps
    dq, dk, dv = _gradients(rows, k[..., :half, :], v[..., :half, :], scale, may[:, :half])
    dq2, dk2, dv2 = _gradients(rows.past(half), k[..., half:, :], v[..., half:, :], scale, may[half:, half:])
    wide = rows.total.dtype
    both = (dq[..., half:, :].to(wide) + dq2.to(wide)).to(dq.dtype)
    joined = ((dq[..., :half, :], both), (dk, dk2), (dv, dv2))
    return tuple(torch.cat(parts, dim=-2) for parts in joined)


def _gradients(rows: _Rows, k: Tensor, v: Tensor, scale: float, may: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v (.., keys, d) from rows that may look at keys (.., rows, keys)."""
    q, do, total, inner = rows
    scores = (q @ k.mT).to(total.dtype) * scale - total
    # At most 1: large scores are rounded in q's dtype, and may lie above the exact logarithm of the sum.
    p = torch.where(may, scores, float("-inf")).clamp(max=0).exp()
    ds = (p * ((do @ v.mT).to(total.dtype) - inner) * scale).to(q.dtype)
    return ds @ k, ds.mT @ q, p.to(q.dtype).mT @ do

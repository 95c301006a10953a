"""Attention for short sequences on a CPU: the fused kernel forward, batched products backward.

PyTorch's fused backward on CPUs costs three times what its products do at a few hundred positions; the
probabilities, which make this grow with the square of the length, are small then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.attention.alike import alike
from veneer.ops.lowrank import refuse_second_order

LONGEST = 384  # positions: from 512 on PyTorch's own backward is as fast


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
        steps = torch.arange(q.shape[-2], device=q.device)
        may = steps[:, None] >= steps if mask is None else mask
        scores = (q @ k.mT).to(total.dtype) * ctx.scale - total[..., None]  # (b, heads, t, t)
        p = torch.where(may, scores, float("-inf")).exp()
        inner = (do.to(total.dtype) * out).sum(-1, keepdim=True)
        ds = (p * ((do @ v.mT).to(total.dtype) - inner) * ctx.scale).to(q.dtype)
        return ds @ k, ds.mT @ q, p.to(q.dtype).mT @ do, None, None

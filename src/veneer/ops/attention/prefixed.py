"""Attention to trained keys and values in front of a text without gradients, on a CPU.

So it is in a model's first layer. PyTorch's backward makes the gradients of all keys, of which those of the
prefix are a few thin products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.attention.alike import alike
from veneer.ops.lowrank import refuse_second_order


def attend(
    q: Tensor, k: Tensor, v: Tensor, K: Tensor, V: Tensor, *, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Returns softmax(scale q [K k]') [V v], (b, heads, t, d); K, V: (heads, p, d).

    mask: (b or 1, heads or 1, t, p + t), True where a position may look, and so at all of K.
    """
    q, k, v, K, V = alike(q, k, v, K, V)
    out: Tensor = _Prefixed.apply(q, k, v, K, V, scale, mask)
    return out


def suits(q: Tensor, k: Tensor, v: Tensor, K: Tensor) -> bool:
    """Returns True if `attend` supports these: on a CPU, with gradients for the prefix only."""
    moving = q.requires_grad or k.requires_grad or v.requires_grad
    return torch.is_grad_enabled() and K.requires_grad and not moving and q.device.type == "cpu"


def behind(keys: Tensor, own: Tensor) -> Tensor:
    """Returns keys or values (b, heads, t, d) behind those of a prefix (heads, p, d)."""
    return torch.cat([own.expand(keys.shape[0], -1, -1, -1), keys], 2)


class _Prefixed(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, K: Tensor, V: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        bias = (
            None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        )
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, total = attend(q, behind(k, K), behind(v, V), 0.0, False, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, K, V, out, total)
        ctx.scale = scale
        return out  # type: ignore[no-any-return, unused-ignore]

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        q, K, V, out, total = ctx.saved_tensors
        scores = ctx.scale * (q @ K.mT).to(total.dtype) - total[..., None]  # (b, heads, t, p)
        P = scores.clamp(max=0).exp()  # large scores are rounded, and may lie above the exact total
        inner = torch.linalg.vecdot(do.to(total.dtype), out.to(total.dtype))[..., None]
        dS = (P * ((do @ V.mT).to(total.dtype) - inner) * ctx.scale).to(q.dtype)
        return None, None, None, (dS.mT @ q).sum(0), (P.to(q.dtype).mT @ do).sum(0), None, None

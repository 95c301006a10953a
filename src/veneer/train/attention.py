"""The attention of transformers models in compiled training on a CPU; outside of its reach it is PyTorch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.ops.attention import attend, suits

NAME = "veneer_short"
OWN = "sdpa"  # what it stands in for
FASTER = (torch.bfloat16,)  # where it has been measured to be


def use_short(model: Any) -> bool:
    """Whether the model's attention now has the faster backward: one of such a dtype on a CPU that uses PyTorch's fused one.

    It pays only under torch.compile, which makes few passes of the many that its formulas are.
    """
    from transformers import PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    first = next(model.parameters())
    fits = isinstance(model, PreTrainedModel) and first.device.type == "cpu" and first.dtype in FASTER
    if not fits or model.config._attn_implementation != OWN:
        return False
    ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[OWN])
    model.set_attn_implementation(NAME)
    return True


def use_own(model: Any) -> None:
    """PyTorch's attention again, where `use_short` took it away."""
    if getattr(model, "config", None) is not None and model.config._attn_implementation == NAME:
        model.set_attn_implementation(OWN)


def forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, **options: Any
) -> tuple[Tensor, None]:
    """transformers' interface: query (b, heads, t, d), key and value with as many heads or a divisor -> (b, t, heads, d)."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    known = {n for n, v in options.items() if v is not None} <= {"scaling", "is_causal", "position_ids", "use_cache"}
    plain = causal if attention_mask is None else attention_mask.dtype == torch.bool
    if not (plain and known and not dropout and suits(query, key)):
        own: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, **options)
        return own
    times = query.shape[1] // key.shape[1]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    out = attend(query, repeat_kv(key, times), repeat_kv(value, times), scale=scale, mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None

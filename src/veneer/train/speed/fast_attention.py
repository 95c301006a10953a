"""Faster attention for transformers models in training on a CPU; in all other cases PyTorch's own.

Two cases are faster than a fused kernel with a mask: the compiled backward of short sequences, and windows of
several documents, each computed for itself from its beginning, without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.modes import in_mode
from veneer.ops.attention.documents import as_mask, attend_within
from veneer.ops.attention.short import LONGEST, attend, suits
from veneer.tasks.text.checks import context

SHORT, DOCUMENTS = "veneer_short", "veneer_documents"  # both cases, or the second alone
OWN = "sdpa"  # the implementation that they replace
FASTER = (torch.bfloat16,)  # dtypes in which SHORT was measured to be faster


def use_faster(model: Any, ids: Tensor, *, compiled: bool) -> bool:
    """Switches a model on a CPU to faster attention if it can; tells if it did.

    Short sequences are faster only under torch.compile, which fuses the many passes of their formulas. ids:
    any tokens, on which documents in a long window must give PyTorch's features.
    """
    from transformers import PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    first = next(model.parameters())
    fits = isinstance(model, PreTrainedModel) and first.device.type == "cpu"
    if not fits or model.config._attn_implementation != OWN:
        return False
    for name, function in ((SHORT, short), (DOCUMENTS, documents)):
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    name, long = (
        SHORT if compiled and first.dtype in FASTER else DOCUMENTS,
        (context(model) or math.inf) > LONGEST,
    )
    if name == SHORT or long:
        expected = _features(model, ids) if long else None
        model.set_attn_implementation(name)
        if expected is not None and not _near(_features(model, ids), expected):
            model.set_attn_implementation(OWN)
    return bool(model.config._attn_implementation == name)


def _features(model: Any, ids: Tensor) -> Tensor:
    """Returns the body's features of two documents in a window just longer than `LONGEST`."""
    t = LONGEST + 8
    row = ids.flatten().repeat(-(-t // ids.numel()))[None, :t]
    positions = torch.cat([torch.arange(t // 2), torch.arange(t - t // 2)])[None]
    with in_mode(model, training=False), torch.enable_grad():  # the mask is another one without gradients
        found: Tensor = model.base_model(input_ids=row, position_ids=positions, use_cache=False)[0]
    return found.detach()


def _near(found: Tensor, expected: Tensor) -> bool:
    """Tells if two features agree to a model's rounding; texts that see each other differ by far more."""
    return bool(
        (found - expected).float().norm()
        <= max(1e-4, 8 * torch.finfo(expected.dtype).eps) * expected.float().norm()
    )


def use_own(model: Any) -> None:
    """Switches back to PyTorch's attention after `use_faster`."""
    if getattr(model, "config", None) is not None and model.config._attn_implementation in (SHORT, DOCUMENTS):
        model.set_attn_implementation(OWN)


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, **options: Any
) -> Tensor | None:
    """Returns transformers' own mask, or the position where each document begins, (b, 1, t, 1), as integers.

    The latter in training on long windows whose positions see their document up to themselves and nothing
    else.
    """
    from transformers.masking_utils import sdpa_mask

    plain = options.get("attention_mask") is None and q_length == kv_length
    if (
        plain
        and q_length > LONGEST
        and torch.is_grad_enabled()
        and isinstance(q_offset, int)
        and q_offset == kv_offset == 0
    ):
        starts = _starts(options["mask_function"], batch_size, q_length, options.get("device", "cpu"))
        if starts is not None and bool(starts.any()):
            return starts[:, None, :, None]
    own: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **options)
    return own


def _starts(may: Callable[..., Tensor], b: int, t: int, device: Any) -> Tensor | None:
    """Returns where documents begin, by asking `may`(row, head, position, seen position); None for another
    mask.

    A document continues where a position sees the one before it. Then its last position must see its first,
    and no position its next one or the end of the document before: sliding windows and images that see
    forward are others.
    """
    row, place = torch.arange(b, device=device)[:, None], torch.arange(t, device=device)

    def sees(seen: Tensor) -> Tensor:
        inside = (seen >= 0) & (seen < t)
        found = may(row, torch.zeros_like(row), place.expand(b, t), seen.clamp(0, t - 1).expand(b, t))
        return found & inside

    begins = ~sees(place - 1)
    starts = torch.where(begins, place, 0).cummax(1).values
    whole = sees(starts).all() & sees(place).all()
    return starts if bool(whole) and not bool((sees(place + 1) | sees(starts - 1)).any()) else None


def documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Returns attention (b, t, heads, d), as transformers asks for it.

    query (b, heads, t, d); key and value have as many heads or a divisor.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        own: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, **options
        )
        return own
    if dropout or not _knows(options):
        return documents(module, query, key, value, as_mask(attention_mask[:, 0, :, 0]), dropout, **options)
    times, scale = query.shape[1] // key.shape[1], options.get("scaling") or query.shape[-1] ** -0.5
    out = attend_within(
        query, repeat_kv(key, times), repeat_kv(value, times), attention_mask[:, 0, :, 0], scale=scale
    )
    return out.transpose(1, 2).contiguous(), None


def short(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Returns attention as `documents` does, with its own backward for short sequences."""
    from transformers.integrations.sdpa_attention import repeat_kv

    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = causal if attention_mask is None else attention_mask.dtype == torch.bool
    if not (plain and _knows(options) and not dropout and suits(query, key)):
        return documents(module, query, key, value, attention_mask, dropout, **options)
    times = query.shape[1] // key.shape[1]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    out = attend(query, repeat_kv(key, times), repeat_kv(value, times), scale=scale, mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _knows(options: dict[str, Any]) -> bool:
    """Tells if the options that are set are all known here."""
    known = {"scaling", "is_causal", "position_ids", "use_cache"}
    return {n for n, v in options.items() if v is not None} <= known

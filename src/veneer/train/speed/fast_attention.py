"""The attention of transformers models in training on a CPU; outside of its reach it is PyTorch's own.

Two things are faster there than a fused kernel with a mask: the backward of short sequences, where it is compiled, and windows
of several documents, each of which is computed for itself from where it begins, with no mask made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ops.attention.documents import as_mask, attend_within
from veneer.ops.attention.short import LONGEST, attend, suits
from veneer.train.checks import context

SHORT, DOCUMENTS = "veneer_short", "veneer_documents"  # the second one alone, or both
OWN = "sdpa"  # what they stand in for
FASTER = (torch.bfloat16,)  # where the first one has been measured to be


def use_faster(model: Any, ids: Tensor, *, compiled: bool) -> bool:
    """Whether the model's attention is now what is faster: one on a CPU that uses PyTorch's fused one.

    That of short sequences pays only under torch.compile, which makes few passes of the many that its formulas are. ids: any
    tokens, on which documents in a long window have to come out as they do with PyTorch's.
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
    """What the model's body makes of two documents in a window just longer than `LONGEST`."""
    t, training = LONGEST + 8, model.training
    row = ids.flatten().repeat(-(-t // ids.numel()))[None, :t]
    positions = torch.cat([torch.arange(t // 2), torch.arange(t - t // 2)])[None]
    model.eval()
    try:
        with torch.enable_grad():  # the mask is another one without
            found: Tensor = model.base_model(input_ids=row, position_ids=positions, use_cache=False)[0]
    finally:
        model.train(training)
    return found.detach()


def _near(found: Tensor, expected: Tensor) -> bool:
    """Whether the two differ by what rounding adds up to over a model's layers; texts that see each other differ by far more."""
    return bool(
        (found - expected).float().norm()
        <= max(1e-4, 8 * torch.finfo(expected.dtype).eps) * expected.float().norm()
    )


def use_own(model: Any) -> None:
    """PyTorch's attention again, where `use_faster` took it away."""
    if getattr(model, "config", None) is not None and model.config._attn_implementation in (SHORT, DOCUMENTS):
        model.set_attn_implementation(OWN)


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, **options: Any
) -> Tensor | None:
    """transformers' interface: its own mask, or where each position's document begins, (b, 1, t, 1) in whole numbers.

    The latter in training on long windows whose positions see all of their document up to themselves and nothing else.
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
    """Where documents begin, found out from `may`(row, head, position, seen position); None where it is another mask.

    A document goes on where a position sees the one before it. Its last position then has to see its first, and none the next
    one of its own or the last one of the document before: windows that slide, and images that see forward, are other masks.
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
    """transformers' interface: query (b, heads, t, d), key and value with as many heads or a divisor -> (b, t, heads, d)."""
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
    """As `documents`, with a backward of its own for short sequences."""
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
    """Whether nothing is asked for but these."""
    return {n for n, v in options.items() if v is not None} <= {
        "scaling",
        "is_causal",
        "position_ids",
        "use_cache",
    }

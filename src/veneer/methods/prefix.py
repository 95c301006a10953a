"""Prefix-tuning: every attention sees p more keys and values, which are trained.  Li & Liang 2021,
https://arxiv.org/abs/2101.00190

The prefix has no tokens: positions of the text, caches and masks stay as they were, so generation works with
and without a cache and with padding on the left. With rotary positions every query sees the trained keys at
the distance at which they were trained. The paper trains them through a network that is dropped afterwards.
Here they are trained directly, as is usual for large models.

PEFT shifts the text by p positions, behind the keys. With rotary positions that equals rotated keys, and
files go both ways. With learned positions, and in layers with a sliding window, the text itself differs, and
such files are refused.

Parameters: 2 p d a layer (d: kv_heads * head_dim).
State: keys and values.
Cost: p more positions in every attention. It cannot be merged. At strengths other than 1 and beside other
prefixes each prefix costs a second attention: changes add up as changes of the attention's output.
Use: as the baseline of the LoRA paper.
Against: hard to train. It starts as noise that takes some of the attention away, not as the base. More than
32 positions a layer do worse in the LoRA paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, NotMergeable, SiteError
from veneer.methods.base.checks import check_free_rank
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.peft import PeftKind
from veneer.methods.base.protocols import OpensModel
from veneer.ops.attention import prefixed
from veneer.ops.draws import keyed
from veneer.sites import AttentionSite, Site
from veneer.sites.attention import is_self_attention
from veneer.sites.find import named
from veneer.sites.finding.names import Target
from veneer.sites.own import child_of

NAME, OWN = "veneer_prefix", "sdpa"  # our attention in transformers' registry, and the one that it calls


@final
class Prefix(Delta, OpensModel, PeftKind):
    """K and V (kv_heads, p, head_dim) start as small noise."""

    peft_settings = {
        **dict.fromkeys(
            [
                "encoder_hidden_size",
                "init_weights",
                "num_attention_heads",
                "num_layers",
                "num_virtual_tokens",
                "token_dim",
            ]
        ),
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }

    def __init__(self, site: Site, *, length: int = 16, start: float = 0.1, seed: int = 0) -> None:
        """
        length: p, the number of positions added to every attention
        start: size of the initial noise of keys and values
        seed: key of the noise, together with the layer's name
        """
        super().__init__()
        if not isinstance(site, AttentionSite):
            raise SiteError(f"prefix adds to attentions; {site.name!r} was given as a matrix")
        check_free_rank(length, site, 1 << 16)
        draw, like = keyed(seed, site.key), site.weight()
        K, V = (start * torch.randn(2, site.heads, length, site.head_dim, generator=draw)).to(
            like.device, master_dtype(site)
        )
        self.K, self.V = nn.Parameter(K.clone()), nn.Parameter(V.clone())

    @classmethod
    def find(
        cls,
        model: nn.Module,
        to: Target | None,
        exclude: Target = (),
        untie: bool = False,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> list[Site]:
        """Returns every self-attention, or those in `to`."""
        names = named(model, None if to == "all-linear" else to, exclude, is_self_attention)
        if not names:
            raise SiteError(
                f"{type(model).__name__} has no known self-attention; prefix works on transformers' models"
            )
        _check_attention(model)
        return [AttentionSite(n, model.get_submodule(n)) for n in names]

    @classmethod
    def open(cls, model: Any) -> None:
        """Routes the model's attentions through `attention`; find() has checked their kind."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[OWN])
        model.set_attn_implementation(NAME)

    @classmethod
    def close(cls, model: Any) -> None:
        """Restores the model's own attention."""
        model.set_attn_implementation(OWN)

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") in ("PREFIX_TUNING", "CARTRIDGE")  # of one layout

    def delta(self, site: Site) -> Tensor:
        raise NotMergeable(
            f"the prefix of {site.name!r} holds keys and values and cannot be merged; keep it as an adapter"
        )

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        raise SiteError(f"the attention {site.name!r} was called outside of its model; call the model")


def _check_attention(model: Any) -> None:
    """Raises ConfigError unless the model's attention is PyTorch's, or already ours."""
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if own not in (OWN, NAME):
        raise ConfigError(
            f"prefix needs attn_implementation={OWN!r}, the model has {own!r};"
            f" load it with attn_implementation={OWN!r}"
        )


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Computes attention by transformers' interface: query (b, heads, t, d), key and value (b, kv_heads, ..)
    -> (b, t, heads, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    deltas: Any = child_of(module)
    acting = [] if deltas is None else [(deltas[name], strength) for name, strength in deltas.active.items()]
    if acting and not torch.compiler.is_compiling():
        deltas.called = True
        deltas.stepped = module.training
    seen = [
        (_attend(delta, module, query, key, value, attention_mask, options), strength)
        for delta, strength in acting
    ]
    if [strength for _, strength in seen] == [1.0]:
        return seen[0][0], None
    base: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    return base + sum(strength * (y - base) for y, strength in seen) if seen else base, None


def _attend(
    delta: Prefix,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Returns the attention with one prefix in front: (b, t, heads, d)."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    t, p, causal = query.shape[2], delta.K.shape[1], options.get("is_causal")
    if mask is not None:
        mask = nn.functional.pad(mask, (p, 0), value=True if mask.dtype == torch.bool else 0.0)
    elif (module.is_causal if causal is None else causal) and t > 1:
        # A static cache may be longer than its content; PyTorch's attention cuts it the same way.
        key, value = key[:, :, :t], value[:, :, :t]
        mask = torch.ones(t, p + t, dtype=torch.bool, device=key.device).tril_(p)[None, None]
    K, V = delta.K.to(key.dtype), delta.V.to(key.dtype)
    plain = (mask is None or mask.dtype == torch.bool) and not options.get("dropout")
    known = {n for n, v in options.items() if v is not None} <= {
        "scaling",
        "dropout",
        "is_causal",
        "position_ids",
        "use_cache",
    }
    if plain and known and prefixed.suits(query, key, value, K):
        times, scale = query.shape[1] // key.shape[1], options.get("scaling") or query.shape[-1] ** -0.5
        text = (repeat_kv(t, times) for t in (key, value))
        own = (t.repeat_interleave(times, 0) for t in (K, V))
        return prefixed.attend(query, *text, *own, scale=scale, mask=mask).permute(0, 2, 1, 3).contiguous()
    y: Tensor = sdpa_attention_forward(
        module, query, prefixed.behind(key, K), prefixed.behind(value, V), mask, **options
    )[0]
    return y

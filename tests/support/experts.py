"""Small mixtures of experts of transformers, whose matrices are bare parameters."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROUTED = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
KINDS = {
    "mixtral": (
        T.MixtralForCausalLM,
        T.MixtralConfig,
        dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen3_moe": (
        T.Qwen3MoeForCausalLM,
        T.Qwen3MoeConfig,
        dict(intermediate_size=48, num_experts=4, head_dim=8, **ROUTED),
    ),
    "deepseek_v3": (
        T.DeepseekV3ForCausalLM,
        T.DeepseekV3Config,
        dict(
            intermediate_size=48,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            head_dim=4,
            **{**ROUTED, "num_key_value_heads": 4},
        ),
    ),
    "gpt_oss": (
        T.GptOssForCausalLM,
        T.GptOssConfig,
        dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    ),
    "llama4": (
        T.Llama4ForCausalLM,
        T.Llama4TextConfig,
        dict(
            intermediate_size=48,
            intermediate_size_mlp=48,
            num_local_experts=4,
            num_experts_per_tok=1,
            head_dim=8,
            pad_token_id=0,
        ),
    ),
}
TRANSPOSED = ("gpt_oss", "llama4")


def model(kind: str, implementation: str = "eager", seed: int = 0) -> nn.Module:
    """Returns a model of the kind in eval mode; every expert's numbers are drawn at random."""
    torch.manual_seed(seed)
    whole, config, settings = KINDS[kind]
    own = {} if kind == "llama4" else {"experts_implementation": implementation}
    made: nn.Module = whole._from_config(
        config(**{**SIZES, **settings}), attn_implementation="eager", **own
    ).eval()
    for p in made.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.2)
    return made


def ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 90, (rows, 9), generator=torch.Generator().manual_seed(5))


def shake(adapted: nn.Module, seed: int = 1, scale: float = 0.05) -> nn.Module:
    """Moves every trained number away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return adapted


def logits(adapted: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return adapted(ids() if x is None else x).logits

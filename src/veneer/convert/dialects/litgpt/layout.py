"""LitGPT's files, names of layers, and sizes of attention."""

from __future__ import annotations

from veneer.convert.base import Base

FILE, SETTINGS, MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
FUSED = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
PLAIN = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
FLAGS = {"lora_projection": ("attn.proj",), "lora_mlp": ("mlp.fc_1", "mlp.fc_2", "mlp.proj")}
LLAMA_LIKE = ("LLaMAMLP", "GemmaMLP")
WHY = "LitGPT fuses q, k and v into one layer"


def heads(base: Base) -> tuple[list[int], list[int]]:
    """Returns the numbers and the widths of the heads of q, k and v.

    Raises ConfigError if they are unknown.
    """
    base.need("heads", "kv_heads", "head", why=WHY)
    assert base.heads and base.kv_heads and base.head
    return [base.heads, base.kv_heads, base.kv_heads], [base.head] * 3

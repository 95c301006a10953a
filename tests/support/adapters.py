"""A tiny Llama to adapt, and adapters moved away from their start."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.adapt.attached import changes


def llama(tie=False):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tie, max_position_embeddings=32))


def shake(model, name="default"):
    with torch.no_grad():
        for _, delta in changes(model, name):
            for p in delta.parameters():
                p.add_(0.1 * torch.randn_like(p))


IDS = torch.arange(12).view(2, 6)

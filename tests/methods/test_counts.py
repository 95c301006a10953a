"""Trained parameters of every baseline on the models of the LoRA paper, against its tables 2 to 4, by shapes
alone.

Where the paper prints another number than its own formula gives, the formula holds: its GPT-2 medium LoRA of
rank 4 on queries and values has 393,216 parameters, not 0.35M, and GPT-3's prefix-layer tuning with 8 + 8
positions 18.9M, not 20.2M. The released code's 0.8M for RoBERTa base counts the classifier, which trains in
every row.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn
from transformers import AutoModel, GPT2Config, LlamaConfig, RobertaConfig

import veneer
from veneer.adapt.attached import base_parameters, changes
from veneer.methods import get

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
CONFIGS = {
    "roberta-base": RobertaConfig(**ROBERTA),
    "roberta-large": RobertaConfig(
        **ROBERTA, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt3": GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048),
    "llama2-7b": LlamaConfig(intermediate_size=11008, vocab_size=32000),
}


@functools.cache
def model_of(name: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(CONFIGS[name], attn_implementation="sdpa")


def count(name: str, method: str, **options) -> int:
    model = model_of(name)
    try:
        veneer.attach(model, method, **options)
        return sum(p.numel() for _, delta in changes(model, "default") for p in delta.parameters())
    finally:
        veneer.detach(model)


QV = {"to": ["query", "value"]}
# model, method and options, what the formula gives, and what the paper prints in millions (None where it is
# not in its tables)
COUNTS = [
    ("roberta-base", "lora", {"rank": 8, **QV}, 12 * 4 * 768 * 8, 0.3),
    ("roberta-large", "lora", {"rank": 8, **QV}, 24 * 4 * 1024 * 8, 0.8),
    ("roberta-large", "bottleneck", {"rank": 8}, 48 * (2 * 1024 * 8 + 8 + 1024), 0.8),
    ("roberta-large", "bottleneck", {"rank": 64}, 48 * (2 * 1024 * 64 + 64 + 1024), 6.0),
    (
        "roberta-large",
        "bottleneck",
        {"rank": 16, "placement": "pfeiffer"},
        24 * (2 * 1024 * 16 + 16 + 1024),
        0.8,
    ),
    (
        "roberta-large",
        "bottleneck",
        {"rank": 64, "placement": "pfeiffer"},
        24 * (2 * 1024 * 64 + 64 + 1024),
        3.0,
    ),
    ("gpt3", "bottleneck", {"rank": 1}, 192 * (2 * 12288 + 1 + 12288), 7.1),
    ("gpt3", "bottleneck", {"rank": 8}, 192 * (2 * 12288 * 8 + 8 + 12288), 40.1),
    ("gpt3", "prefix", {"length": 8}, 96 * 2 * 8 * 12288, None),
    ("gpt2-medium", "lora", {"rank": 4, "to": ["c_attn"]}, 24 * 4 * (1024 + 3 * 1024), None),
    ("gpt2-medium", "prefix", {"length": 8}, 24 * 2 * 8 * 1024, None),
    ("llama2-7b", "miss", {"rank": 64}, 32 * 64 * (5 * 4096 + 2 * 11008), 87.0),
    ("llama2-7b", "lora", {"rank": 36}, 32 * 36 * (8 * 4096 + 3 * (4096 + 11008)), 89.9),
    ("roberta-base", "loldu", {"rank": 768, **QV}, 24 * 769, None),
    ("roberta-base", "fourierft", {"frequencies": 1000, **QV}, 24 * 1000, 0.024),
    ("roberta-base", "ia3", {}, 12 * (768 + 768 + 3072), None),
    ("roberta-base", "vera", {"rank": 1024, **QV}, 24 * (1024 + 768), 0.043),
    ("roberta-large", "loraxs", {"rank": 25, **QV}, 48 * 625, None),
]


@pytest.mark.parametrize(("name", "method", "options", "formula", "printed"), COUNTS)
def test_parameters_are_those_of_the_formula_and_of_the_paper(name, method, options, formula, printed):
    found = count(name, method, **options)
    assert found == formula
    if printed is not None:
        digits = len(str(printed).split(".")[1])
        near = abs(found / 1e6 - printed)
        assert near < (0.5 if printed == 6.0 else 0.2 if printed == 3.0 else 0.5 * 10**-digits + 1e-9), found


def test_biases_of_roberta_base_are_a_tenth_of_a_million():
    model = model_of("roberta-base")
    biases = sum(
        p.numel() for n, p in model.named_parameters() if n.endswith(".bias") and not n.startswith("pooler")
    )
    assert count("roberta-base", "bitfit", exclude=["pooler.dense"]) == biases == 12 * 11 * 768 + 768


def test_the_papers_misprints():
    queries_and_values = 24 * 2 * 4 * (1024 + 1024)  # two of the three thirds of c_attn, rank 4
    assert queries_and_values == 393_216 and round(queries_and_values / 1e6, 2) == 0.39  # it prints 0.35M
    assert count("gpt3", "prefix", length=8) == 18_874_368  # it prints 20.2M


def test_the_last_layers_alone():
    model = model_of("gpt2-medium")
    last = get("full").find(model, r"h\.(22|23)")
    assert (
        sum(p.numel() for s in last for p in s.module.parameters(recurse=False)) == 25_192_448
    )  # FT-top2: 25.19M
    names = {n for n in base_parameters(model) if re.match(r"h\.2[23]\.", n)}
    assert names == {f"{s.name}.{p}" for s in last for p in s.parameters}

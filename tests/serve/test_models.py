"""Models of several families: packed steps are exact or not used, and static batches answer the same."""

from __future__ import annotations

import pytest
import torch
from support import served, tiny
from support.models import gpt2, randomise
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import veneer
from veneer.errors import ConfigError

SIZES = dict(
    vocab_size=len(tiny.tokenizer()),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
}


def of_family(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**SIZES, **FAMILIES[name]}))
    return model.float().eval()


def answers(model, requests, engine):
    with veneer.serve(
        model, {"a": "a", "b": "b"}, tokenizer=tiny.tokenizer(), engine=engine, step_tokens=24
    ) as server:
        kind = type(server.engine.runner).__name__
        streams = [server.stream(p, m, max_tokens=12, temperature=0, ignore_eos=True) for p, m in requests]
        return kind, [[t for e in s for t in getattr(e, "tokens", ())] for s in streams]


def expected(model, prompt, terms):
    out = []
    with torch.no_grad(), veneer.using(model, terms):
        for _ in range(12):
            logits = model(torch.tensor([[*prompt, *out]]), use_cache=False).logits[0, -1]
            out.append(int(logits.argmax()))
    return out


REQUESTS = [("", {}), ("a", {"a": 1.0}), ("b@0.5", {"b": 0.5}), ("a+b@-0.5", {"a": 1.0, "b": -0.5})]


@pytest.mark.parametrize("engine", ["packed", "static"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_answers_are_those_of_the_model(family, engine):
    if family == "gpt2":
        model = gpt2(vocab_size=len(tiny.tokenizer()), n_positions=256)
    else:
        model = of_family(family)
    for seed, name in enumerate("ab"):
        veneer.attach(model, "lora", rank=2, name=name)
        randomise(model, name, seed=seed, size=0.1)
    prompts = [served.prompt(i, 7 + 11 * i) for i in range(len(REQUESTS))]
    right = [expected(model, p, terms) for p, (_, terms) in zip(prompts, REQUESTS, strict=True)]
    kind, got = answers(model, [(p, m) for p, (m, _) in zip(prompts, REQUESTS, strict=True)], engine)
    assert kind == engine.capitalize() and got == right


def test_a_model_without_our_attention_gets_static_batches(caplog):
    torch.manual_seed(0)
    kind = CONFIG_MAPPING["mamba"]
    model = AutoModelForCausalLM.from_config(
        kind(
            vocab_size=len(tiny.tokenizer()),
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            pad_token_id=0,
        )
    ).eval()
    with veneer.serve(model, tokenizer=tiny.tokenizer()) as server:
        assert type(server.engine.runner).__name__ == "Static"
        p = served.prompt(1, 9)
        got = server.complete(p, max_tokens=6, temperature=0, ignore_eos=True).tokens
    assert "batches are static" in caplog.text
    assert list(got) == expected(model, p, {})[:6]
    with pytest.raises(ConfigError, match="engine=packed cannot run this model"):
        veneer.serve(model, tokenizer=tiny.tokenizer(), engine="packed")


EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("engine", ["packed", "static"])
@pytest.mark.parametrize("family", EXPERTS)
def test_answers_of_fused_experts_are_those_of_each_sum_alone(family, engine):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **EXPERTS[family]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for p in model.parameters():
        if p.ndim == 3:
            torch.nn.init.normal_(p, std=0.2)
    for seed, name in enumerate("ab"):
        veneer.attach(model, "lora", rank=2, name=name, to=["experts", "attention"])
        randomise(model, name, seed=seed, size=0.3)
    prompts = [served.prompt(i, 7 + 11 * i) for i in range(len(REQUESTS))]
    right = [expected(model, p, terms) for p, (_, terms) in zip(prompts, REQUESTS, strict=True)]
    assert len({tuple(r) for r in right}) == len(right)  # each sum has an answer of its own
    kind, got = answers(model, [(p, m) for p, (m, _) in zip(prompts, REQUESTS, strict=True)], engine)
    assert kind == engine.capitalize() and got == right

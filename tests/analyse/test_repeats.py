"""Simulating one block of each kind gives the memory and operations of simulating all blocks."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from support import models
from support.objectives import causal_lm
from transformers import Gemma2Config, Gemma2ForCausalLM

from veneer.adapt.attach import attach
from veneer.analyse.cost import repeats, simulate
from veneer.analyse.cost.memory import Rise
from veneer.analyse.cost.repeats import Stretch, joined
from veneer.compress.quantise import quantise
from veneer.ops.chunked import cross_entropy
from veneer.tasks.base.shape import Shape
from veneer.tasks.text import next_token
from veneer.train.speed import compiling

SHAPE = Shape(rows=3, tokens=20, labels=50)
llama = functools.partial(models.llama, num_hidden_layers=6)


def gemma():
    """Sliding and full attention take turns, so that no block is like the one before it."""
    config = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=7, head_dim=8)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**config))


def adapted(model, *given, **options):
    return attach(model, *given, **options)


def in_codes():
    model = llama(hidden_size=64, intermediate_size=128)
    quantise(model, "nf4")
    return attach(model, "lora", rank=2)


def tied():
    return attach(llama(tie_word_embeddings=True), "lora", to=["embed_tokens", "q_proj"], untie=True, rank=2)


CASES = {
    "lora": lambda: adapted(llama(), "lora", rank=4),
    "lora in the feed-forward layers": lambda: adapted(llama(), "lora", to=["up_proj"], rank=4),
    "lora in upper blocks": lambda: adapted(llama(), "lora", to=r".*layers\.[3-5]\..*q_proj", rank=4),
    "lora in every other block": lambda: adapted(llama(), "lora", to=r".*layers\.[135]\..*_proj", rank=4),
    "lora of two ranks": lambda: adapted(llama(), "lora", rank_pattern={r".*layers\.[02]\..*": 2}),
    "lora with dropout": lambda: adapted(llama(), "lora", rank=2, dropout=0.1),
    "two loras": lambda: adapted(adapted(llama(), "lora", name="a"), "lora", rank=2, name="b"),
    "lora and an embedding": tied,
    "dora": lambda: adapted(llama(), "dora", rank=4),
    "vera": lambda: adapted(llama(), "vera", rank=4),
    "fourierft": lambda: adapted(llama(), "fourierft", frequencies=8),
    "bottleneck": lambda: adapted(llama(), "bottleneck", rank=4),
    "prefix": lambda: adapted(llama(), "prefix", length=3),
    "codes": in_codes,
    "gpt2": lambda: adapted(models.gpt2(n_layer=5), "lora", rank=4),
    "gemma2": lambda: adapted(gemma(), "lora", rank=4),
    "eager attention": lambda: adapted(llama(attn_implementation="eager"), "lora", rank=4),
}
STEPS = {
    "plain": {},
    "full": {"full": True, "base": torch.float32},
    "autocast": {"full": True, "autocast": True},
}


def whole(monkeypatch):
    """Takes away all that is run once and counted several times."""
    monkeypatch.setattr(repeats, "stack", lambda model: None)
    monkeypatch.setattr(simulate, "stack", lambda model: None)
    monkeypatch.setattr(repeats.Repeats, "counted", lambda self, times: nullcontext())
    every = lambda *given, chunks, kernel, **rest: cross_entropy(*given, **rest)  # noqa: E731
    monkeypatch.setattr(next_token, "cross_entropy", every)


def both(monkeypatch, model, shape, **how):
    with monkeypatch.context() as patch:
        whole(patch)
        expected = simulate.step(model, shape, causal_lm(), **how)
    return simulate.step(model, shape, causal_lm(), **how), expected


@pytest.mark.parametrize("case", CASES)
def test_one_block_of_each_kind_stands_for_all(monkeypatch, case):
    found, expected = both(monkeypatch, CASES[case](), SHAPE)
    assert found == expected


@pytest.mark.parametrize("how", STEPS)
def test_so_it_is_in_other_precisions_and_when_all_is_trained(monkeypatch, how):
    found, expected = both(monkeypatch, llama(), SHAPE, **{"full": True, **STEPS[how]})
    assert found == expected


@pytest.mark.parametrize(
    "shape", [SHAPE._replace(packed=True), SHAPE._replace(passes=3), SHAPE._replace(labels=1)]
)
def test_so_it_is_in_batches_of_other_shapes(monkeypatch, shape):
    found, expected = both(monkeypatch, attach(llama(), "lora", rank=4), shape)
    assert found == expected


def test_so_it_is_where_blocks_are_computed_again(monkeypatch):
    model = attach(llama(), "lora", rank=4)
    with compiling.recomputing(model):
        found, expected = both(monkeypatch, model, SHAPE)
        assert found == expected
    assert found.memory.activations < simulate.step(model, SHAPE, causal_lm()).memory.activations


@pytest.mark.parametrize("labels", [300, 600, 1000])
def test_chunks_of_the_loss_stand_for_each_other(monkeypatch, labels):
    model = attach(llama(vocab_size=5000), "lora", to=["lm_head", "q_proj"], rank=2)
    found, expected = both(monkeypatch, model, Shape(20, 50, labels))
    assert found == expected


def test_only_kinds_run(monkeypatch):
    ran = []
    model = attach(llama(num_hidden_layers=9), "lora", rank=4)
    for i, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
    own = list(model.model.layers)
    simulate.step(model, SHAPE, causal_lm())
    assert ran == [0, 1]  # nothing below the first takes a gradient
    assert list(model.model.layers) == own and all(
        a is b for a, b in zip(model.model.layers, own, strict=True)
    )


def test_stretches_join_end_to_end():
    up, peak, down = Rise(5, 5), Rise(0, 7), Rise(-5, 1)
    found = joined([Stretch(up, down, (1,)), Stretch(peak, up, (2,)), Stretch(up, peak, (3,))])
    assert found == Stretch(Rise(10, 12), Rise(0, 7), (6,))

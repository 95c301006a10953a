"""Prefix-tuning: what an attention then computes, generation with and without a cache, padding, and what it
is not."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import bert, conv_net, gpt2, llama, output, randomise
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.merge import merge
from veneer.errors import ConfigError, FormatError, NotMergeable, SiteError
from veneer.methods.prefix import attention


def with_prefix(build, **options):
    model = veneer.attach(build(), "prefix", length=3, **options)
    randomise(model, size=0.5)
    return model


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_keys_and_values_stand_in_front_and_the_model_is_otherwise_itself(build):
    base = build()
    expected = output(base)
    model = with_prefix(build)
    assert len(changes(model, "default")) == 2 and list(base.state_dict()) == [
        n for n in model.state_dict() if ".deltas." not in n
    ]
    y = output(model)
    assert not torch.allclose(y, expected, atol=1e-3)
    with veneer.using(model):
        assert torch.equal(output(model), expected)
    veneer.detach(model)
    assert model.config._attn_implementation == "sdpa" and torch.equal(output(model), expected)


@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize("kind", ["causal", "free", "masked"])
def test_an_attention_with_a_prefix_is_a_softmax_over_all(kind, moving):
    """With `text`, gradients reach the text too, as behind the first layer; otherwise the prefix alone."""
    model = with_prefix(lambda: llama().double())
    site, delta = changes(model, "default")[0]
    q, k, v = (torch.randn(2, heads, 5, 8, dtype=torch.float64, requires_grad=moving) for heads in (4, 2, 2))
    sees = torch.ones(2, 5, 5, dtype=torch.bool)
    if kind == "causal":
        sees = sees.tril()
    elif kind == "masked":  # one text is padded on the left
        sees[1, :, :2] = False
    y, _ = attention(
        site.module,
        q,
        k,
        v,
        sees[:, None] if kind == "masked" else None,
        scaling=0.3,
        is_causal=kind == "causal",
    )
    rows = []
    for b in range(2):
        for t in range(5):
            seen = torch.cat([torch.ones(3, dtype=torch.bool), sees[b, t]])
            for head in range(4):
                K, V = (
                    torch.cat([delta.K[head // 2], k[b, head // 2]])[seen],
                    torch.cat([delta.V[head // 2], v[b, head // 2]])[seen],
                )
                rows.append(torch.softmax(0.3 * K @ q[b, head, t], 0) @ V)
    expected = torch.stack(rows).view(2, 5, 4, 8)
    torch.testing.assert_close(y, expected)
    trained = [delta.K, delta.V, *([q, k, v] if moving else [])]
    found, wanted = (torch.autograd.grad(out.sin().sum(), trained) for out in (y, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "strengths",
    [{"default": 0.5}, {"default": 2.0}, {"default": 0.5, "second": -2.0}, {"default": 1.0, "second": 1.0}],
)
def test_strengths_scale_what_each_prefix_changes_and_the_changes_add_up(strengths):
    model = veneer.attach(with_prefix(lambda: llama().double()), "prefix", length=2, name="second")
    randomise(model, "second", size=0.5)
    q, k, v = (torch.randn(1, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2))

    def in_front(K, V):
        """The attention of 4 heads over 2 pairs of keys and values, all of which every token sees."""
        K, V = (
            torch.cat([t, own[0]], 1).repeat_interleave(2, 0) for t, own in ((K, k), (V, v))
        )  # (4, p + 5, 8)
        return (torch.softmax(0.3 * q[0] @ K.mT, -1) @ V).transpose(0, 1)[None]

    nothing = torch.zeros(2, 0, 8)
    base = expected = in_front(nothing, nothing)
    for name, strength in strengths.items():
        site, delta = changes(model, name)[0]
        expected = expected + strength * (in_front(delta.K, delta.V) - base)
    with veneer.using(model, strengths):
        y, _ = attention(site.module, q, k, v, None, scaling=0.3, is_causal=False)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("moving", [True, False])
def test_where_no_scale_is_given_it_is_that_of_the_heads_size(moving):
    model = with_prefix(lambda: llama().double())
    site, _ = changes(model, "default")[0]
    q, k, v = (torch.randn(2, heads, 5, 8, dtype=torch.float64, requires_grad=moving) for heads in (4, 2, 2))
    plain, given = (
        attention(site.module, q, k, v, None, is_causal=True, **more)[0]
        for more in ({}, {"scaling": 8**-0.5})
    )
    torch.testing.assert_close(plain, given)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_generation_with_and_without_a_cache_and_padded_on_the_left(build):
    model = with_prefix(build)
    ids = torch.tensor([[5, 9, 33, 2, 71], [8, 8, 41, 6, 90]])
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **asked)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **asked))
    base = copy.deepcopy(model)
    veneer.detach(base)
    assert not torch.equal(cached, base.generate(ids, use_cache=True, **asked))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(8) >= 3).long().expand(2, -1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **asked)[:, 3:], cached)


def test_it_trains_dials_stacks_and_is_saved(tmp_path):
    model = with_prefix(llama)
    base, y = output(llama()), output(model)
    model.train()
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.grad is not None} == {"K", "V"}
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if n.endswith((".K", ".V")))
    with veneer.using(model.eval(), {"default": 0.0}):
        torch.testing.assert_close(output(model), base)
    veneer.save(model, tmp_path)
    torch.testing.assert_close(
        output(veneer.load(llama(), tmp_path)), y, rtol=0, atol=1e-5
    )  # keys are turned in PEFT's file
    veneer.attach(model, "lora", rank=2, name="low")
    randomise(model, "low")
    both = output(model)
    with veneer.using(model, "default"):
        assert torch.equal(output(model), y)
    assert not torch.allclose(both, y)
    veneer.attach(model, "prefix", length=2, name="second")
    assert torch.isfinite(output(model)).all()
    veneer.detach(model, "default")
    assert model.config._attn_implementation == "veneer_prefix"


def test_a_model_with_another_attention_is_refused_on_loading_too_and_left_as_it_was(tmp_path):
    veneer.save(with_prefix(llama), tmp_path)
    model = llama(attn_implementation="eager")
    y = output(model)
    with pytest.raises(FormatError, match="prefix needs attn_implementation='sdpa', the model has 'eager'"):
        veneer.load(model, tmp_path)
    assert (
        not veneer.adapters(model)
        and model.config._attn_implementation == "eager"
        and torch.equal(output(model), y)
    )


def test_what_it_is_not():
    with pytest.raises(
        NotMergeable,
        match=r"the prefix of 'model\.layers\.0\.self_attn' holds keys and values and cannot be merged",
    ):
        merge(with_prefix(llama), probe={})
    with pytest.raises(
        SiteError, match="ConvNet has no known self-attention; prefix works on transformers' models"
    ):
        veneer.attach(conv_net(), "prefix")
    with pytest.raises(ConfigError, match="prefix needs attn_implementation='sdpa', the model has 'eager'"):
        veneer.attach(llama(attn_implementation="eager"), "prefix")
    assert not veneer.adapters(nn.Sequential())

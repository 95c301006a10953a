"""An attention with a prefix: masks, causality, caches, options, precision, and what it starts with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import llama, randomise
from torch import Tensor

import veneer
from veneer import methods
from veneer.adapt.attached import changes
from veneer.errors import ShapeError
from veneer.methods.prefix import attention
from veneer.ops.attention import prefixed
from veneer.sites import AttentionSite
from veneer.sites.own import child_of

P, T = 3, 5  # positions of the prefix, and of the text


@pytest.fixture(scope="module")
def made() -> Any:
    model = veneer.attach(llama().double(), "prefix", length=P)
    randomise(model, size=0.5)
    return changes(model, "default")[0]


def drawn(t: int = T, keys: int = T) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, n, 8, dtype=torch.float64, generator=draw)
        for heads, n in ((4, t), (2, keys), (2, keys))
    ]


def expected(delta: Any, q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """Softmax over all of the prefix and the keys that each position sees: sees (t, keys)."""
    K = torch.cat([delta.K.expand(2, -1, -1, -1), k], 2).repeat_interleave(2, 1)
    V = torch.cat([delta.V.expand(2, -1, -1, -1), v], 2).repeat_interleave(2, 1)
    seen = torch.cat([torch.ones(len(sees), P, dtype=torch.bool), sees], 1)
    scores = (q @ K.mT * 0.3).masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, -1) @ V).transpose(1, 2)


FREE, CAUSAL = torch.ones(T, T, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool).tril()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("of_module", [True, False])
@pytest.mark.parametrize("asked", [True, False, None])
def test_an_option_says_what_is_causal_and_else_the_module(made, asked, of_module, grad, monkeypatch):
    site, delta = made
    monkeypatch.setattr(site.module, "is_causal", of_module)
    causal = of_module if asked is None else asked
    with torch.set_grad_enabled(grad):
        y, weights = attention(site.module, *drawn(), None, scaling=0.3, is_causal=asked)
    assert weights is None
    torch.testing.assert_close(y, expected(delta, *drawn(), CAUSAL if causal else FREE))


@pytest.mark.parametrize("grad", [True, False])
def test_masks_may_be_numbers_too(made, grad):
    site, delta = made
    sees = CAUSAL.clone()
    sees[:, 1] = False
    numbers = torch.zeros(T, T, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    for mask in (sees, numbers):
        with torch.set_grad_enabled(grad):
            y, _ = attention(site.module, *drawn(), mask[None, None], scaling=0.3)
        torch.testing.assert_close(y, expected(delta, *drawn(), sees))


def test_a_cache_may_be_longer_than_its_content_and_one_query_sees_all_of_it(made):
    site, delta = made
    q, k, v = drawn(T, T + 4)
    y, _ = attention(site.module, q, k, v, None, scaling=0.3, is_causal=True)
    torch.testing.assert_close(y, expected(delta, q, k[:, :, :T], v[:, :, :T], CAUSAL))
    q, k, v = drawn(2, 2)
    y, _ = attention(site.module, q, k, v, None, scaling=0.3, is_causal=True)
    torch.testing.assert_close(y, expected(delta, q, k, v, CAUSAL[:2, :2]))
    q, k, v = drawn(1, 7)
    y, _ = attention(site.module, q, k, v, None, scaling=0.3, is_causal=True)
    torch.testing.assert_close(y, expected(delta, q, k, v, torch.ones(1, 7, dtype=torch.bool)))


ALONE: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"dropout": 0.0, "is_causal": True, "position_ids": torch.arange(T), "use_cache": False}, True),
    ({"sliding_window": None}, True),
    ({"dropout": 0.5}, False),
    ({"sliding_window": 4}, False),
]


@pytest.mark.parametrize(("options", "alone"), ALONE)
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float64])
def test_gradients_of_the_prefix_alone_are_made_where_nothing_else_is_asked(
    made, options, alone, mask, monkeypatch
):
    site, _ = made
    calls: list[int] = []
    real = prefixed.attend
    monkeypatch.setattr(prefixed, "attend", lambda *a, **k: calls.append(1) or real(*a, **k))
    given = None if mask is None else torch.ones(1, 1, T, T).to(mask)
    attention(site.module, *drawn(), given, scaling=0.3, **options)
    assert len(calls) == (alone and mask is not torch.float64)


def test_dropout_acts_behind_a_prefix(made):
    site, _ = made
    torch.manual_seed(0)
    first, second = (attention(site.module, *drawn(), None, dropout=0.5)[0] for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("grad", [True, False])
def test_a_prefix_has_the_precision_of_the_text(made, grad):
    site, _ = made
    with torch.set_grad_enabled(grad):
        y, _ = attention(site.module, *(t.bfloat16() for t in drawn()), None, scaling=0.3)
        exact, _ = attention(site.module, *drawn(), None, scaling=0.3)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 0.02 * exact.norm()


def test_a_call_is_noted_with_its_mode(made):
    site, _ = made
    deltas = child_of(site.module)
    for training in (True, False):
        deltas.called, deltas.stepped = False, not training
        site.module.train(training)
        attention(site.module, *drawn(), None)
        assert deltas.called and deltas.stepped == training


def test_attentions_without_an_acting_prefix_are_the_models_own():
    model = veneer.attach(llama(), "prefix", length=P, to=["1.self_attn"])
    randomise(model, size=0.5)
    site, _ = changes(model, "default")[0]
    deltas = child_of(site.module)
    own = [t.float() for t in drawn()]
    first, last = (layer.self_attn for layer in model.model.layers)
    deltas.called = deltas.stepped = False
    with veneer.using(model):
        off = attention(last, *own, None, is_causal=True)[0]
    assert not deltas.called
    assert torch.equal(off, attention(first, *own, None, is_causal=True)[0])
    assert not torch.allclose(off, attention(last, *own, None, is_causal=True)[0])
    assert deltas.called


def test_lengths_of_a_prefix_have_a_limit():
    site = AttentionSite("0", llama().model.layers[0].self_attn)
    for length in (0, (1 << 16) + 1):
        with pytest.raises(ShapeError, match=f"{length}"):
            methods.build(methods.get("prefix"), site, {"length": length})
    assert methods.build(methods.get("prefix"), site, {"length": 1 << 16}).K.shape == (2, 1 << 16, 8)


def test_a_prefix_starts_as_noise_of_its_size_and_seed():
    site = AttentionSite("0", llama().model.layers[0].self_attn)

    def built(**options: Any) -> Any:
        return methods.build(methods.get("prefix"), site, {"length": 500, **options})

    for size in (0.1, 0.5):
        delta = built(start=size)
        for t in (delta.K.detach(), delta.V.detach()):
            assert t.shape == (2, 500, 8)
            assert float(t.std()) == pytest.approx(size, rel=0.04) and abs(float(t.mean())) < 0.06 * size
    assert not torch.equal(delta.K, delta.V)
    assert torch.equal(built(seed=0).K, built().K) and not torch.equal(built(seed=1).K, built().K)


def test_all_attentions_or_those_of_a_name():
    model, find = llama(), methods.get("prefix").find
    every = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [s.name for s in find(model, None)] == [s.name for s in find(model, "all-linear")] == every
    assert [s.name for s in find(model, ["1.self_attn"])] == every[1:]
    assert [s.name for s in find(model, None, exclude=["1.self_attn"])] == every[:1]

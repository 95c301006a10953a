"""Attention with a backward of its own: equal to PyTorch's, plain and compiled, and used only where it is
exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import llama, randomise
from support.objectives import causal_lm

import veneer
from veneer.ops.attention import prefixed
from veneer.ops.attention.documents import attend_within
from veneer.ops.attention.short import LONGEST, attend
from veneer.tasks.text import next_token
from veneer.train.speed import compile_settings, fast_attention
from veneer.train.speed.compile_settings import KEPT
from veneer.train.speed.compiling import prepare, restore


def tensors(t, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, t, 3, 16, generator=draw, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(4)
    ]


def documents(t):
    place = torch.arange(t)
    return ((place[:, None] >= place) & (place[:, None] // 7 == place // 7))[None, None]


def relative(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("t", "compiled"), [(2, False), (33, False), (33, True), (65, False), (128, True), (256, True)]
)
def test_output_and_gradients_are_pytorchs(t, compiled, dtype, tolerance, masked):
    q, k, v, do = tensors(t, dtype)
    mask = documents(t) if masked else None

    def own(q, k, v):
        return attend(q, k, v, scale=0.3, mask=mask)

    torch._dynamo.reset()
    ours = (torch.compile(own, dynamic=False) if compiled else own)(q, k, v)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.3)
    assert relative(ours, theirs) <= tolerance
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), do), torch.autograd.grad(theirs, (q, k, v), do), strict=True
    ):
        assert relative(a, b) <= tolerance


@pytest.mark.parametrize(
    ("way", "compiled"), [("short", False), ("documents", False), ("documents", True), ("prefixed", False)]
)
def test_under_autocast_all_parts_take_its_dtype_as_in_pytorchs(way, compiled):
    q, k, v, do = (x.detach() for x in tensors(48, torch.float32))
    v, trained = v.bfloat16(), torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    moving = trained.requires_grad_() if way == "prefixed" else q.requires_grad_()
    starts = torch.zeros(2, 48, dtype=torch.long)

    def own():
        if way == "short":
            return attend(q, k, v, scale=0.3)
        if way == "documents":
            return attend_within(q, k, v, starts, scale=0.3)
        mask = torch.ones(48, 48).tril().bool()
        return prefixed.attend(
            q, k, v, trained, trained, scale=0.3, mask=F.pad(mask, (4, 0), value=True)[None, None]
        )

    def theirs():
        if way != "prefixed":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        K, V = prefixed.behind(k, trained), prefixed.behind(v.float(), trained)
        mask = F.pad(torch.ones(48, 48).tril().bool(), (4, 0), value=True)
        return F.scaled_dot_product_attention(q, K, V, attn_mask=mask, scale=0.3)

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (torch.compile(own, dynamic=False) if compiled else own)(), theirs()
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert relative(ours, expected) <= 2e-2
    (a,), (b,) = (torch.autograd.grad(y, moving, do.to(y)) for y in (ours, expected))
    assert a.dtype == b.dtype == torch.float32
    assert relative(a, b) <= 3e-2


def test_a_row_that_sees_nothing_gives_no_gradient_and_no_nan():
    q, k, v, do = tensors(5, torch.float32)
    mask = documents(5)
    mask[..., 2, :] = False
    for g in torch.autograd.grad(attend(q, k, v, scale=1.0, mask=mask), (q, k, v), do):
        assert g.isfinite().all()


def batch(t=12):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (2, t), generator=draw)
    return {"input_ids": ids, "labels": torch.randint(0, 97, (2, t), generator=draw)}


def packed(t=12):
    return {**batch(t), "position_ids": torch.cat([torch.arange(5), torch.arange(t - 5)]).expand(2, t)}


def step(model, objective, given):
    model.zero_grad()
    loss, n = objective(model, given)
    (loss / n).backward()
    return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("make", "kept"), [(batch, KEPT), (packed, 0.4)])
def test_a_compiled_training_step_is_the_plain_one(make, kept, monkeypatch):
    model = veneer.attach(llama(attn_implementation="sdpa"), "lora", rank=2).train()
    randomise(model)
    given = make()
    loss, gradients = step(model, next_token.loss, given)
    monkeypatch.setattr(fast_attention, "FASTER", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(compile_settings, "KEPT", kept)
    objective = prepare(model, causal_lm(), given, compiled=True)
    assert model.config._attn_implementation == fast_attention.SHORT
    ours, own = step(model, objective, given)
    assert relative(ours, loss) <= 1e-5 and own.keys() == gradients.keys()
    for k, g in gradients.items():
        assert relative(own[k], g) <= 1e-5, k
    restore(model)
    assert model.config._attn_implementation == "sdpa" and all(
        m._compiled_call_impl is None for m in model.modules()
    )


@pytest.mark.parametrize("to", [r".*layers\.1\..*", r".*layers\.0\..*o_proj|.*layers\.1\..*"])
def test_blocks_that_are_adapted_in_other_layers_have_graphs_of_their_own(to):
    torch._dynamo.reset()
    model = veneer.attach(llama(attn_implementation="sdpa"), "lora", to=to, rank=2).train()
    randomise(model)
    given = batch()
    loss, gradients = step(model, next_token.loss, given)
    ours, own = step(model, prepare(model, causal_lm(), given, compiled=True), given)
    restore(model)
    assert relative(ours, loss) <= 1e-5 and own.keys() == gradients.keys()
    for k, g in gradients.items():
        assert relative(own[k], g) <= 1e-5, k


def test_other_cases_are_pytorchs_own(monkeypatch):
    monkeypatch.setattr(fast_attention, "FASTER", (torch.float32,))
    calls = []
    monkeypatch.setattr(fast_attention, "attend", lambda *a, **k: calls.append(a) or attend(*a, **k))
    model = llama(attn_implementation="sdpa", max_position_embeddings=512).train()
    assert fast_attention.use_faster(model, batch()["input_ids"], compiled=True)
    model(**batch()).logits.sum().backward()
    assert len(calls) == 2
    calls.clear()
    with torch.no_grad():
        model(**batch())
    model.generate(batch()["input_ids"], max_new_tokens=2, pad_token_id=0)
    model(**batch(LONGEST + 1))
    assert not calls
    fast_attention.use_own(model)
    for other in (llama(attn_implementation="eager"), torch.nn.Linear(2, 2)):
        assert not fast_attention.use_faster(other, batch()["input_ids"], compiled=True)


def test_large_scores_give_bounded_gradients():
    """Scores of a thousand are rounded by several units in bfloat16, whose exp would overflow."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        t.to(torch.bfloat16).requires_grad_() for t in 60 * torch.randn(3, 1, 2, 80, 32, generator=draw)
    )
    do = torch.randn(q.shape, generator=draw)
    ours = torch.autograd.grad(attend(q, k, v, scale=0.5), (q, k, v), do.to(q.dtype))
    # every p is at most 1, so that |dv| is at most the sum of |do|
    assert ours[2].float().norm() <= 80 * do.norm()
    assert all(g.isfinite().all() for g in ours)


def test_large_scores_of_a_prefix_give_bounded_gradients():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (60 * torch.randn(3, 1, 2, 80, 32, generator=draw)).to(torch.bfloat16)
    K, V = (60 * torch.randn(2, 2, 8, 32, generator=draw)).to(torch.bfloat16)
    own = (K.requires_grad_(), V.requires_grad_())
    do = torch.randn(q.shape, generator=draw)
    found = torch.autograd.grad(prefixed.attend(q, k, v, *own, scale=0.5), own, do.to(q.dtype))
    assert found[1].float().norm() <= 80 * do.norm()
    assert all(g.isfinite().all() for g in found)

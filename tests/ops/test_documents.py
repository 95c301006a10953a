"""Attention within documents that share a window: equal to PyTorch's with a mask, and used only where the
mask is just that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCABULARY, llama, randomise
from support.objectives import causal_lm

import veneer
from veneer.ops.attention import documents as ops
from veneer.ops.attention.short import LONGEST
from veneer.tasks.text import next_token
from veneer.train.speed import fast_attention
from veneer.train.speed.compiling import prepare, restore

LENGTHS = [[5, 1, 33, 9], [48], [20, 28]]  # of the documents in each row


def starts_of(rows):
    return torch.stack(
        [torch.cat([torch.full((n,), sum(row[:i])) for i, n in enumerate(row)]) for row in rows]
    )


def positions_of(rows):
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def dense(rows):
    blocks = [torch.block_diag(*(torch.ones(n, n).tril() for n in row)).bool() for row in rows]
    return torch.stack(blocks)[:, None]


def relative(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_with_a_mask(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(ops, "FUSED", 30)  # so that bfloat16 takes both ways
    draw = torch.Generator().manual_seed(0)
    q, k, v, do = (
        torch.randn(3, 48, 4, 16, generator=draw).to(dtype).transpose(1, 2).requires_grad_() for _ in range(4)
    )
    starts, mask = starts_of(LENGTHS), dense(LENGTHS)
    assert torch.equal(ops.as_mask(starts), mask)
    ours = ops.attend_within(q, k, v, starts, scale=0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    assert relative(ours, theirs) <= tolerance
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), do), torch.autograd.grad(theirs, (q, k, v), do), strict=True
    ):
        assert relative(a, b) <= tolerance


def packed(rows):
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, VOCABULARY, (len(rows), sum(rows[0])), generator=draw) for _ in range(2))
    return {"input_ids": ids, "labels": labels, "position_ids": positions_of(rows)}


LONG = [[130, 3, 200, LONGEST - 300], [LONGEST + 33], [1, LONGEST + 32]]


def small(**config):
    return llama(**{"max_position_embeddings": 1024, "attn_implementation": "sdpa", **config})


def step(model, objective, given):
    model.zero_grad()
    loss, n = objective(model, given)
    (loss / n).backward()
    return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_step_on_packed_windows_makes_no_mask_and_is_the_plain_one(compiled, monkeypatch):
    model = veneer.attach(small(), "lora", rank=2).train()
    randomise(model)
    given = packed(LONG)
    loss, gradients = step(model, next_token.loss, given)
    objective = prepare(model, causal_lm(), given, compiled=compiled)
    assert model.config._attn_implementation == fast_attention.DOCUMENTS
    monkeypatch.setattr(
        "transformers.masking_utils.sdpa_mask", lambda *a, **k: pytest.fail("a mask was made")
    )
    ours, own = step(model, objective, given)
    assert relative(ours, loss) <= 1e-5 and own.keys() == gradients.keys()
    for k, g in gradients.items():
        assert relative(own[k], g) <= 1e-5, k
    restore(model)
    assert model.config._attn_implementation == "sdpa"


def given_to_attention(model, rows, monkeypatch):
    """Collects the masks that the attention function receives."""
    seen = []
    real = fast_attention.documents
    monkeypatch.setattr(
        fast_attention,
        "documents",
        lambda m, q, k, v, mask, *a, **o: seen.append(mask) or real(m, q, k, v, mask, *a, **o),
    )
    prepare(model, causal_lm(), packed(rows))
    seen.clear()
    next_token.loss(model, packed(rows))[0]
    return seen


def test_boundaries_are_used_where_a_mask_is_nothing_else(monkeypatch):
    model = small().train()
    seen = given_to_attention(model, LONG, monkeypatch)
    assert len(seen) == 2 and all(torch.equal(s[:, 0, :, 0], starts_of(LONG)) for s in seen)
    assert given_to_attention(model, [[LONGEST + 1]], monkeypatch) == [
        None,
        None,
    ]  # one document: the kernel's own causal form
    with torch.no_grad():
        assert all(m.dtype == torch.bool for m in given_to_attention(model, LONG, monkeypatch))
    assert all(m.dtype == torch.bool for m in given_to_attention(model, LENGTHS, monkeypatch))
    restore(model)


def test_windows_that_slide_and_images_that_see_forward_are_other_masks():
    n = 12

    def may(forward=0, window=n):
        document = torch.tensor([[0] * 5 + [1] * 7])

        def function(b, h, q, k):
            back = (k <= q) & (document[b, q] == document[b, k]) & (q - k < window)
            return back | ((q < forward) & (k < forward))

        return function

    assert fast_attention._starts(may(), 1, n, "cpu").tolist() == [[0] * 5 + [5] * 7]
    assert (
        fast_attention._starts(may(window=7), 1, n, "cpu") is not None
        and fast_attention._starts(may(window=6), 1, n, "cpu") is None
    )
    assert (
        fast_attention._starts(may(forward=3), 1, n, "cpu") is None
        and fast_attention._starts(may(forward=7), 1, n, "cpu") is None
    )


def test_dropout_and_models_that_treat_masks_otherwise_are_pytorchs_own(monkeypatch):
    model = small(attention_dropout=0.5).train()
    prepare(model, causal_lm(), packed(LONG))
    monkeypatch.setattr(fast_attention, "attend_within", lambda *a, **k: pytest.fail("it has no dropout"))
    next_token.loss(model, packed(LONG))[0]
    restore(model)
    monkeypatch.undo()
    odd = small()
    real = fast_attention._starts
    monkeypatch.setattr(
        fast_attention,
        "_starts",
        lambda *given: None if (s := real(*given)) is None else (s - 9).clamp_min(0),
    )
    assert not fast_attention.use_faster(odd, packed(LONG)["input_ids"], compiled=False)
    assert odd.config._attn_implementation == "sdpa"

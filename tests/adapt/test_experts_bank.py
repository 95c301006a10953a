"""Several adapters on fused experts in one batch: every row as if its adapter were alone."""

from __future__ import annotations

import copy

import pytest
import torch
from support import experts

import veneer
from veneer.adapt import attached
from veneer.adapt.banks.entries import entries
from veneer.adapt.banks.segments import SegmentBank
from veneer.errors import ConfigError, ShapeError
from veneer.sites.bare.site import ParameterSite

KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
ROWS = ["a", None, "b", "a"]
IDS = torch.randint(3, 96, (4, 7), generator=torch.Generator().manual_seed(4))


def adapted(kind, method="lora", implementation="eager", dtype=torch.float64):
    """A model with two adapters, of ranks 2 and 3, on experts and attention."""
    model = experts.model(kind, implementation).to(dtype)
    for seed, (name, rank) in enumerate((("a", 2), ("b", 3)), 1):
        veneer.attach(model, method, name=name, to=["experts", "o_proj"], rank=rank)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, delta in attached.changes(model, name):
                for p in delta.parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=draw).to(p))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def alone(model, name, ids):
    with veneer.using(model, *([name] if name else [])):
        return logits(model, ids)


def oracle(kind, model, name):
    """The plain model whose weights are W + s B A, written by hand."""
    plain = experts.model(kind).double()
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for site, delta in attached.changes(model, name):
            change = delta.scaling * delta.B @ delta.A
            if isinstance(site, ParameterSite):
                holder = site.module
                owner = next(n for n, m in model.named_modules() if m is holder.owner)
                stack = getattr(modules[owner], holder.parameter)
                stack[holder.index] += change.mT if holder.transposed else change
            else:
                modules[site.name].weight += change
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_its_own_experts(kind):
    model = adapted(kind)
    plain = {None: experts.model(kind).double(), **{n: oracle(kind, model, n) for n in ("a", "b")}}
    wanted = torch.cat([logits(plain[n], IDS[i : i + 1]) for i, n in enumerate(ROWS)])
    base = logits(plain[None], IDS)
    rows = veneer.bank(model, ["a", "b"])
    found = logits(model, IDS) if rows.use(ROWS) else None
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert all((found[i] - base[i]).abs().max() > 1e-2 for i in (0, 2, 3))
    torch.testing.assert_close(found[1], base[1], rtol=1e-9, atol=1e-9)
    rows.use("b")
    torch.testing.assert_close(logits(model, IDS), logits(plain["b"], IDS), rtol=1e-9, atol=1e-9)
    rows.use(None)
    torch.testing.assert_close(logits(model, IDS), base, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["dora", "miss"])
def test_other_methods_share_a_batch_too(method):
    model = adapted("mixtral", method)
    wanted = torch.cat([alone(model, n, IDS[i : i + 1]) for i, n in enumerate(ROWS)])
    veneer.bank(model, ["a", "b"]).use(ROWS)
    torch.testing.assert_close(logits(model, IDS), wanted, rtol=1e-9, atol=1e-9)


def test_grouped_products_agree_too():
    model = adapted("mixtral", implementation="grouped_mm", dtype=torch.float32)
    wanted = torch.cat([alone(model, n, IDS[i : i + 1]) for i, n in enumerate(ROWS)])
    veneer.bank(model, ["a", "b"]).use(ROWS)
    torch.testing.assert_close(logits(model, IDS), wanted, rtol=1e-4, atol=1e-4)


def test_adapters_learn_from_their_own_rows():
    model = adapted("mixtral")
    separate = copy.deepcopy(model)
    for p in (p for n in ("a", "b") for _, d in attached.changes(separate, n) for p in d.parameters()):
        p.requires_grad_(True)
    veneer.bank(model, ["a", "b"], trainable=True).use(ROWS)
    model(input_ids=IDS).logits.square().sum().backward()
    for name in ("a", "b"):
        mine = IDS[[i for i, n in enumerate(ROWS) if n == name]]
        with veneer.using(separate, name):
            separate(input_ids=mine).logits.square().sum().backward()
        pairs = zip(attached.changes(model, name), attached.changes(separate, name), strict=True)
        for (_, delta), (_, other) in pairs:
            for p, q in zip(delta.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)
        assert any(p.grad.abs().max() > 0 for _, d in attached.changes(model, name) for p in d.parameters())


def test_adapters_are_written_into_free_slots_and_evicted():
    model = adapted("mixtral")
    wanted = alone(model, "b", IDS)
    base = alone(model, None, IDS)
    rows = veneer.bank(model, ["a"], slots=2, rank=3)
    rows.write("b")
    rows.use(["b"] * 4)
    torch.testing.assert_close(logits(model, IDS), wanted, rtol=1e-9, atol=1e-9)
    rows.use(["a", None, "b", None])
    found = logits(model, IDS)
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-9, atol=1e-9)
    rows.use(None).evict("b")
    torch.testing.assert_close(logits(model, IDS), base, rtol=1e-9, atol=1e-9)


def test_segments_sum_adapters_with_strengths():
    model = adapted("mixtral", "dora")
    flat = IDS[:1]  # each token of one row with its own sum
    found = entries(model, {"a": "a", "b": "b"})
    with veneer.using(model, {"a": 0.5, "b": 1.0}):
        both = logits(model, IDS[:2])
    wanted = torch.cat([both, alone(model, "a", IDS[2:3]), alone(model, None, IDS[3:])])
    veneer.activate(model)
    bank = SegmentBank(model)
    placed = {n: bank.put(e.forms)[0] for n, e in found.items()}
    n = IDS.shape[1]
    bank.use([(((placed["a"], 0.5), (placed["b"], 1.0)), 2 * n), (((placed["a"], 1.0),), n), ((), n)])
    torch.testing.assert_close(logits(model, IDS), wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(ShapeError, match=r"was called with 7 rows"):
        logits(model, flat)
    bank.close()


def test_experts_that_see_tokens_in_another_order_are_refused():
    model = adapted("llama4")
    with pytest.raises(ConfigError, match=r"of kind 'parameter'; a bank serves"):
        veneer.bank(model, ["a", "b"])
    model = adapted("mixtral")
    veneer.attach(model, "ia3", name="c", to=["experts"])
    with pytest.raises(ConfigError, match="'c': ia3 has no normal form at"):
        veneer.bank(model, ["c"])


def test_a_bank_acts_alone_and_an_error_leaves_the_weights():
    model = adapted("mixtral")
    before = {n: p.clone() for n, p in model.named_parameters()}
    rows = veneer.bank(model, ["a", "b"]).use(ROWS)
    with veneer.using(model, "bank", "a"), pytest.raises(ConfigError, match="a bank must act alone"):
        logits(model, IDS)
    host = next(m for m in model.modules() if type(m).__name__ == "MixtralExperts")

    def fail(*given):
        raise RuntimeError("out of order")

    host.act_fn.forward = fail
    with pytest.raises(RuntimeError, match="out of order"):
        logits(model, IDS)
    del host.act_fn.forward
    veneer.detach(model, "bank")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and rows is not None

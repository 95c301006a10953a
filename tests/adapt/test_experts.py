"""Fused experts and other bare parameters: W' is what their formula says, and low ranks stay factors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import experts
from torch import nn

import veneer
from veneer import methods
from veneer.adapt.acting.changed import Changed, Low
from veneer.adapt.attached import changes
from veneer.errors import ConfigError, SiteError

MATRIX = [m for m in methods.available() if m not in ("bitfit", "bottleneck", "full", "prefix", "ia3")]
WAYS = [("mixtral", w) for w in ("eager", "batched_mm", "grouped_mm")]
WAYS += [("gpt_oss", w) for w in ("eager", "batched_mm", "grouped_mm")]
WAYS += [("qwen3_moe", "grouped_mm"), ("deepseek_v3", "grouped_mm"), ("llama4", "eager")]
FLOAT64 = [w for w in WAYS if w[1] != "grouped_mm"]  # which the grouped product lacks


@pytest.mark.parametrize(("kind", "way"), FLOAT64)
def test_each_expert_gets_the_formula_and_its_gradients(kind, way):
    """Against weights written by hand: W[e] + s B A as (out, in), and A's gradient through them."""
    model = experts.model(kind, way).double()
    written = copy.deepcopy(model)
    experts.shake(veneer.attach(model, "lora", to="experts", rank=3, alpha=6))
    model.zero_grad()
    model(experts.ids()).logits.square().sum().backward()

    leaves, parameters = {}, {}
    for site, delta in changes(model, "default"):
        *owner, index, name = site.name.split(".")
        if owner[-1] != "experts":
            continue
        A, B = (p.detach().clone().requires_grad_() for p in (delta.A, delta.B))
        D = 2.0 * torch.einsum("ok,ki->io" if kind in experts.TRANSPOSED else "ok,ki->oi", B, A)
        leaves[site.name] = A, B, delta
        parameters.setdefault((".".join(owner), name), {})[int(index)] = D
    assert len(leaves) == 2 * 4 * len({o for o, _ in parameters})
    for (owner, name), found in parameters.items():
        module = written.get_submodule(owner)
        W = module.get_parameter(name).detach()
        del module._parameters[name]
        setattr(module, name, W + torch.stack([found[i] for i in range(4)]))
    for site, delta in changes(model, "default"):
        if site.name not in leaves:  # shared experts are layers
            written.get_submodule(site.name).weight.data += 2.0 * (delta.B @ delta.A).detach()
    y = written(experts.ids()).logits
    torch.testing.assert_close(model(experts.ids()).logits, y, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    for A, B, delta in leaves.values():
        for ours, theirs in ((delta.A, A), (delta.B, B)):
            none = torch.zeros_like(theirs)  # an expert without a token
            torch.testing.assert_close(
                none if ours.grad is None else ours.grad,
                none if theirs.grad is None else theirs.grad,
                rtol=1e-8,
                atol=1e-9,
            )


@pytest.mark.parametrize(("kind", "way"), WAYS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_low_ranks_are_multiplied_factor_by_factor(kind, way, method, monkeypatch):
    model = experts.model(kind, way)
    base = experts.logits(model)
    veneer.attach(model, method, to="experts", rank=3)
    monkeypatch.setattr(Changed, "dense", lambda self: pytest.fail("the dense sum was built"))
    torch.testing.assert_close(experts.logits(model), base, rtol=1e-4, atol=1e-5)
    model.train()
    experts.shake(model)(experts.ids()).logits.square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad) or way == "eager"


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize(("kind", "way"), [("mixtral", "grouped_mm"), ("gpt_oss", "eager")])
def test_every_matrix_method_adapts_merges_saves_and_leaves(kind, way, method, tmp_path):
    model = experts.model(kind, way)
    base = experts.logits(model)
    options = {"lora": {"rank": 3}, "oft": {"block": 4}, "hra": {"rank": 2}, "bat": {"rank": 8}}
    options |= {"loldu": {"rank": 8}, "miss": {"rank": 8}}
    veneer.attach(model, method, to="experts", **options.get(method, {}))
    experts.shake(model, scale=0.2)
    adapted = experts.logits(model)
    assert not torch.allclose(adapted, base, atol=1e-5)
    torch.testing.assert_close(experts.logits(copy.deepcopy(model)), adapted, rtol=0, atol=0)
    torch.testing.assert_close(experts.logits(pickle.loads(pickle.dumps(model))), adapted, rtol=0, atol=0)
    veneer.save(model, tmp_path / "a")
    read = veneer.load(experts.model(kind, way), tmp_path / "a")
    torch.testing.assert_close(experts.logits(read), adapted, rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(model)
    veneer.merge(merged)
    torch.testing.assert_close(experts.logits(merged), adapted, rtol=1e-4, atol=2e-5)
    with veneer.using(model):
        assert torch.equal(experts.logits(model), base)
    veneer.detach(model)
    assert torch.equal(experts.logits(model), base)
    assert not any("deltas" in n for n, _ in model.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_several_adapters_of_an_expert_add_up_at_their_strengths():
    model = experts.model("mixtral", "grouped_mm")
    veneer.attach(model, "lora", to=["gate_up_proj"], rank=2, name="one")
    experts.shake(model, 1)
    veneer.attach(model, "dora", to="experts", rank=3, name="two")
    experts.shake(model, 2)
    with veneer.using(model, {"one": 0.5, "two": 2.0}):
        together = experts.logits(model)
    assert set(veneer.active(model)) == {"one", "two"}
    veneer.merge(model, {"one": 0.5, "two": 2.0})
    torch.testing.assert_close(experts.logits(model), together, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("kind", "way"), [("gpt_oss", "grouped_mm"), ("mixtral", "batched_mm"), ("mixtral", "eager")]
)
def test_an_expert_alone_and_an_expert_left_out(kind, way, method):
    model = experts.model(kind, way)
    veneer.attach(model, method, to=r".*experts\.[02]\.down_proj", rank=2, rank_pattern={r"0\.down_proj": 5})
    ranks = {s.name.split("experts.")[1]: d.factors(s).A.shape[0] for s, d in changes(model, "default")}
    assert method == "dora" or ranks == {"0.down_proj": 5, "2.down_proj": 2}
    experts.shake(model)
    adapted = experts.logits(model)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("down_proj")}
    veneer.merge(model)
    torch.testing.assert_close(experts.logits(model), adapted, rtol=1e-4, atol=2e-5)
    for n, p in before.items():
        kept = [torch.equal(p[e], model.get_parameter(n)[e]) for e in range(4)]
        assert kept == [False, True, False, True]


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_a_step_that_reaches_some_experts_only_trains_on(way):
    model = veneer.attach(experts.model("mixtral", way), "lora", to="experts", rank=2).train()
    for _ in range(3):
        model(torch.full((1, 1), 7)).logits.square().sum().backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad]
    assert any(reached) and not all(reached)


def test_checkpointing_recomputes_with_the_same_change():
    grads = []
    for again in (False, True):
        model = veneer.attach(experts.model("mixtral", "grouped_mm"), "lora", to="experts", rank=4)
        experts.shake(model).train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(experts.ids()).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        made = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind)
        self.inner = (
            nn.MultiheadAttention(8, 2, batch_first=True)
            if made is None
            else made(8, 8, 2, bidirectional=True)
        )

    def forward(self, x):
        return (self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x))[0]


@pytest.mark.parametrize("kind", ["lstm", "gru", "attention"])
@pytest.mark.parametrize("method", ["lora", "dora", "hra"])
def test_recurrent_layers_and_packed_projections(kind, method, tmp_path):
    torch.manual_seed(0)
    plain = Recurrent(kind).double().eval()
    model, x = copy.deepcopy(plain), torch.randn(3, 5, 8, dtype=torch.float64)
    to = ["in_proj_weight"] if kind == "attention" else r"inner\.weight_[ih]h_l\d(_reverse)?"
    veneer.attach(model, method, to=to, rank=2)
    assert len(changes(model, "default")) == (1 if kind == "attention" else 8)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
    experts.shake(model).train()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapted = model.eval()(x)
    assert not torch.allclose(adapted, plain(x))
    veneer.save(model, tmp_path / "a")
    loaded = veneer.load(copy.deepcopy(plain), tmp_path / "a")
    torch.testing.assert_close(loaded(x), adapted, rtol=1e-5, atol=1e-6)
    veneer.merge(model, probe={})
    torch.testing.assert_close(model(x), adapted, rtol=1e-9, atol=1e-9)


def test_torch_s_encoder_does_not_pass_the_change_by():
    """Its fast path reads the projection without calling the attention, unless the attention has hooks."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        base = layer(x)
        veneer.attach(layer, "lora", to=["in_proj_weight"], rank=2)
        experts.shake(layer)
        adapted = layer(x)
        veneer.merge(layer, probe={})
        assert not torch.allclose(adapted, base, atol=1e-4)
        torch.testing.assert_close(layer(x), adapted, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    model = experts.model("mixtral")
    with pytest.raises(ConfigError, match=r"dropout must be 0 at parameters such as .*gate_up_proj"):
        veneer.attach(model, "lora", to="experts", dropout=0.1)
    with pytest.raises(SiteError, match=r"needs vectors; .*gate_up_proj"):
        veneer.attach(model, "bottleneck", to=["gate_up_proj"])
    assert not any("deltas" in n for n, _ in model.named_modules())
    odd = nn.Module()
    odd.inner = nn.Module()
    odd.inner.w1 = nn.Parameter(torch.randn(4, 8, 8))
    with pytest.raises(SiteError, match=r"must name matrices of a known layout, got .*inner.w1.*\(4, 8, 8\)"):
        veneer.attach(odd, "lora", to=["w1"])


def test_two_kinds_of_change_of_one_module_are_refused():
    model = veneer.attach(experts.model("mixtral"), "lora", to="experts", rank=2)
    with pytest.raises(SiteError, match="as a site of another kind"):
        veneer.attach(model, "full", to=r".*mlp\.experts", name="whole")
    veneer.detach(model)
    veneer.attach(model, "full", to=r".*mlp\.experts", name="whole")
    with pytest.raises(SiteError, match="as a site of another kind"):
        veneer.attach(model, "lora", to="experts", rank=2)


@pytest.mark.parametrize("flipped", [False, True])
def test_gains_act_on_outputs_in_either_layout(flipped):
    draw = torch.Generator().manual_seed(0)
    W, A, B, excess = (
        torch.randn(2, *shape, generator=draw, dtype=torch.float64)
        for shape in ((5, 7), (3, 7), (5, 3), (5,))
    )
    expected = torch.stack([W[e] + torch.diag(excess[e]) @ W[e] + B[e] @ A[e] for e in range(2)])
    found = Low(A, B, excess).onto(W.mT if flipped else W, flipped=flipped)
    torch.testing.assert_close(found.mT if flipped else found, expected, rtol=1e-12, atol=1e-12)

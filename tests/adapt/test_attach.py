"""Targets, names, ties, readers, strengths: what attach finds, refuses and leaves behind."""

from __future__ import annotations

import pytest
import torch
from support.adapters import IDS, llama, shake
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import veneer
from veneer.adapt.attached import changes, layers
from veneer.errors import ConfigError, ShapeError, SiteError
from veneer.sites import find
from veneer.sites.roles import output_head


def names(model):
    return [d.site.name for d in layers(model)]


def test_all_linear_takes_every_linear_but_the_head():
    model = veneer.attach(llama(), "lora", rank=2)
    assert len(names(model)) == 14 and "lm_head" not in names(model)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16))
    assert names(veneer.attach(gpt2, "lora", rank=2)) == [
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    bert = BertForSequenceClassification(BertConfig(**sizes))
    assert "classifier" in output_head(bert)
    assert all(n.startswith("bert.") for n in names(veneer.attach(bert, "lora", rank=2)))


def test_targets_by_ending_expression_and_exclusion():
    assert len(find(llama(), ["q_proj", "v_proj"])) == 4
    assert len(find(llama(), r".*\.0\..*(q|v)_proj")) == 2
    assert len(find(llama(), "all-linear", exclude=["down_proj"])) == 12
    assert len(find(llama(), "all-linear", exclude=r".*layers\.1.*")) == 7
    assert [s.name for s in find(llama(), ["lm_head", "embed_tokens"])] == ["model.embed_tokens", "lm_head"]


def test_targets_that_match_nothing_are_named_with_the_nearest():
    with pytest.raises(
        SiteError, match=r"no layer is called 'q_prj'; did you mean 'q_proj'\?\nno layer is called 'nope'"
    ):
        find(llama(), ["q_prj", "v_proj", "nope"])
    with pytest.raises(
        SiteError, match=r"no layer matches to='q_proj'; the model has e\.g\. model\.embed_tokens"
    ):
        find(llama(), "q_proj")
    with pytest.raises(SiteError, match="is not a regular expression"):
        find(llama(), "(")
    with pytest.raises(SiteError, match="no layer is left to adapt"):
        find(llama(), ["q_proj"], exclude=["q_proj"])
    with pytest.raises(
        SiteError, match=r"'model.norm' is a LlamaRMSNorm, which holds no linear map known here"
    ):
        find(llama(), ["q_proj", "model.norm"])
    with pytest.raises(SiteError, match=r"name layers inside it, e.g. model.layers.0.self_attn.q_proj"):
        find(llama(), ["self_attn"])


def test_nothing_changes_when_attach_refuses():
    model = llama()
    before, trainable = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    for options in (
        {"rank": 99},
        {"rank": 0},
        {"rnak": 2},
        {"rank": 2, "init": "pisa"},
        {"to": ["nope"]},
        {"rank_pattern": {"zzz": 3}},
        {"name": "a.b"},
    ):
        with pytest.raises((ShapeError, ConfigError, SiteError)):
            veneer.attach(model, "lora", **options)
    assert list(model.state_dict()) == before and [p.requires_grad for p in model.parameters()] == trainable
    assert not any(m._forward_hooks for m in model.modules())


def test_every_layer_too_small_for_the_rank_is_named():
    with pytest.raises(
        ShapeError,
        match=r"rank 17 > min\(out, in\) = 16 at 'model\.layers\.0\.self_attn\.q_proj'; use at"
        r" most 16(.|\n)*and 9 more",
    ):
        veneer.attach(llama(), "lora", rank=17)


def test_options_and_methods_are_suggested():
    with pytest.raises(ConfigError, match=r"unknown method 'lroa'; did you mean 'lora'\?"):
        veneer.attach(llama(), "lroa")
    with pytest.raises(ConfigError, match=r"method 'dora' has no option 'rnak'; did you mean 'rank'\?"):
        veneer.attach(llama(), "dora", rnak=3)
    with pytest.raises(ConfigError, match=r"unknown init 'pisa'; did you mean 'pissa'\?"):
        veneer.attach(llama(), "lora", rank=2, init="pisa")


def test_patterns_give_layers_their_own_rank_and_alpha():
    model = veneer.attach(
        llama(),
        "lora",
        rank=2,
        rank_pattern={"q_proj": 4, r"layers\.1\.mlp\..*": 3},
        alpha_pattern={"q_proj": 5.0},
    )
    by_name = {s.name: d for s, d in changes(model, "default")}
    assert by_name["model.layers.0.self_attn.q_proj"].A.shape[0] == 4
    assert by_name["model.layers.0.self_attn.q_proj"].scaling == 5 / 4
    assert (
        by_name["model.layers.1.mlp.up_proj"].A.shape[0] == 3
        and by_name["model.layers.0.mlp.up_proj"].A.shape[0] == 2
    )
    with pytest.raises(ConfigError, match="matches no adapted layer: zz"):
        veneer.attach(model, "lora", name="b", rank=2, alpha_pattern={"zz": 1.0})


def test_alpha_follows_the_rank_and_the_start():
    for rank, init, scaling in (
        (2, "kaiming", 2.0),
        (4, "gaussian", 2.0),
        (4, "pissa", 1.0),
        (4, "olora", 1.0),
    ):
        delta = changes(veneer.attach(llama(), "lora", rank=rank, init=init), "default")[0][1]
        assert delta.scaling == scaling


def test_a_tied_weight_is_refused_unless_asked_and_merging_changes_one():
    model = llama(tie=True)
    with pytest.raises(SiteError, match=r"'lm_head' shares its weight with model\.embed_tokens.*untie=True"):
        veneer.attach(model, "lora", to=["lm_head"], rank=2)
    veneer.attach(model, "lora", to=["lm_head"], rank=2, untie=True)
    shake(model)
    model.eval()
    y, embedded = model(IDS).logits, model.model.embed_tokens.weight.clone()
    from veneer.adapt.merge import merge

    merge(model)
    torch.testing.assert_close(model(IDS).logits, y)
    assert (
        torch.equal(model.model.embed_tokens.weight, embedded)
        and model.lm_head.weight is not model.model.embed_tokens.weight
    )
    assert not model.config.tie_word_embeddings


def test_layers_read_directly_are_refused():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(
        SiteError,
        match=r"'self_attn\.out_proj' cannot be adapted by a hook: torch's attention.*exclude=\['out_proj'\]",
    ):
        veneer.attach(model, "lora", rank=2, to=["linear1", "out_proj"])
    with pytest.warns(UserWarning, match=r"leaves out 1 of 3 linear layers \(1 read by their owner\)"):
        veneer.attach(model, "lora", rank=2)
    shake(model)
    x = torch.randn(3, 5, 8)
    model.eval()  # torch's fused fast path would read linear1.weight itself, but stands back for hooks
    with torch.no_grad():
        on = model(x)
        with veneer.using(model):
            assert not torch.allclose(on, model(x))


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x) @ self.idle.weight


def test_a_layer_never_called_is_an_error_at_the_first_training_step():
    model = veneer.attach(Partly(), "lora", rank=2, to=["used", "idle"])
    with torch.no_grad():
        model(torch.randn(2, 4))  # no training step yet
    with pytest.raises(
        SiteError, match=r"1 adapted layers were never called in the first training step: idle"
    ):
        model(torch.randn(2, 4))
    fine = veneer.attach(Partly(), "lora", rank=2, exclude=["idle"])
    for _ in range(2):  # the second step looks at the gradients of the first
        fine(torch.randn(2, 4)).sum().backward()
    assert not fine._forward_hooks


def test_a_layer_called_by_keyword_says_so():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(input=x)

    with pytest.raises(SiteError, match="'layer' was called with keywords only"):
        veneer.attach(ByKeyword(), "lora", rank=2)(torch.randn(1, 4))


def test_several_adapters_switch_sum_and_train_apart():
    model = llama().eval()
    base = model(IDS).logits
    veneer.attach(model, "lora", rank=2, name="french")
    veneer.attach(model, "dora", rank=3, to=["q_proj"], name="german")
    shake(model, "french")
    shake(model, "german")
    assert veneer.adapters(model) == ["french", "german"] and veneer.active(model) == {
        "french": 1.0,
        "german": 1.0,
    }
    both = model(IDS).logits
    with veneer.using(model, "french"):
        french = model(IDS).logits
        with veneer.using(model, {"german": 0.5}):
            assert veneer.active(model) == {"german": 0.5}
        assert torch.equal(model(IDS).logits, french)
    assert torch.equal(model(IDS).logits, both) and not torch.allclose(both, french)
    with veneer.using(model):
        assert torch.equal(model(IDS).logits, base)
    veneer.train_only(model, "french")
    assert all(p.requires_grad == (".french." in n) for n, p in model.named_parameters())
    veneer.train_only(model, "base", "german")
    assert all(p.requires_grad == (".french." not in n) for n, p in model.named_parameters())
    veneer.detach(model, "german")
    assert veneer.adapters(model) == ["french"]
    torch.testing.assert_close(model(IDS).logits, french)
    veneer.detach(model)
    assert torch.equal(model(IDS).logits, base) and not any(m._forward_hooks for m in model.modules())


def test_using_restores_after_an_error():
    model = veneer.attach(llama(), "lora", rank=2)
    with pytest.raises(RuntimeError), veneer.using(model):
        raise RuntimeError
    assert veneer.active(model) == {"default": 1.0}


def test_unknown_and_used_names_are_errors():
    model = veneer.attach(llama(), "lora", rank=2, name="french")
    for act in (
        lambda: veneer.activate(model, "frensh"),
        lambda: veneer.train_only(model, "frensh"),
        lambda: veneer.detach(model, "frensh"),
    ):
        with pytest.raises(
            ConfigError, match=r"no adapter called 'frensh' is attached; did you mean 'french'\?"
        ):
            act()
    with pytest.raises(ConfigError, match="'french' is already attached"):
        veneer.attach(model, "lora", rank=2, name="french")
    for name in ("base", "a.b", "", "site", "x" * 65):
        with pytest.raises(ConfigError, match="must be 1 to 64 letters"):
            veneer.attach(model, "lora", rank=2, name=name)


def test_draws_depend_on_seed_and_name_alone():
    def first(seed, to):
        model = veneer.attach(llama(), "lora", rank=2, seed=seed, to=to)
        return {s.name: d.A for s, d in changes(model, "default")}

    torch.manual_seed(1)
    every = first(0, "all-linear")
    torch.manual_seed(2)
    some = first(0, ["v_proj"])
    assert all(torch.equal(A, every[n]) for n, A in some.items())
    assert not torch.equal(every["model.layers.0.self_attn.q_proj"], every["model.layers.0.self_attn.k_proj"])
    assert not any(torch.equal(A, first(1, ["v_proj"])[n]) for n, A in some.items())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_generate_and_gradient_checkpointing(method):
    model = veneer.attach(llama(), method, rank=2)
    shake(model)
    model.eval()
    with_cache = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(
        with_cache, model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    )
    model.train()
    model(IDS, labels=IDS).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(IDS, labels=IDS).loss.backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in plain)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, plain[n])


def test_a_shared_module_is_adapted_once():
    layer = nn.Linear(4, 4)
    model = veneer.attach(nn.Sequential(layer, nn.ReLU(), layer), "lora", rank=2)
    assert names(model) == ["0"] and len(layer._forward_hooks) == 1


def test_detaching_gives_the_base_its_gradients_back():
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    veneer.attach(model, "lora", rank=2, name="a")
    veneer.attach(model, "lora", rank=2, name="b")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "deltas" not in n)
    veneer.detach(model, "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "deltas" not in n)
    veneer.detach(model)
    assert {
        n: p.requires_grad for n, p in model.named_parameters()
    } == before and "_trained_before_adapters" not in vars(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_the_model_leaves_the_changes_precise_and_the_start_the_base(method, cast):
    model = cast(veneer.attach(llama(), method, rank=2).eval())
    wanted = torch.promote_types(model.lm_head.weight.dtype, torch.float32)
    assert {p.dtype for _, d in changes(model, "default") for p in d.parameters()} == {wanted}
    on = model(IDS).logits
    with veneer.using(model):
        assert torch.equal(model(IDS).logits, on)


def test_an_exclude_that_leaves_nothing_out_is_an_error():
    with pytest.raises(SiteError, match=r"exclude='q_porj' leaves out no layer; did you mean 'q_proj'\?"):
        veneer.attach(llama(), "lora", exclude=["v_proj", "q_porj"])
    with pytest.raises(SiteError, match=r"exclude='\[' is not a regular expression"):
        veneer.attach(llama(), "lora", exclude="[")
    with pytest.raises(
        ConfigError, match=r"'\[' in rank_pattern or alpha_pattern is not a regular expression"
    ):
        veneer.attach(llama(), "lora", rank_pattern={"[": 2})


def test_impossible_numbers_are_refused():
    for alpha in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"alpha must be a (number above 0|finite number)"):
            veneer.attach(llama(), "lora", alpha=alpha)
    for rank in ("8", 4.5, True):
        with pytest.raises(ShapeError, match="rank must be an integer >= 1, got"):
            veneer.attach(llama(), "lora", rank=rank)
    model = veneer.attach(llama(), "lora", rank=2)
    with pytest.raises(ConfigError, match="strengths must be finite numbers"):
        veneer.activate(model, {"default": float("nan")})


def test_the_wrapper_of_a_compiled_model_is_refused():
    with pytest.raises(
        ConfigError, match=r"model: must not be torch\.compile's wrapper; pass the model itself"
    ):
        veneer.attach(torch.compile(llama()), "lora", rank=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", veneer.methods.available())
def test_whole_numbers_stay_whole_when_a_model_is_cast(name, dtype):
    """Places and permutations keep their type; what trains keeps float32 at least."""
    model = llama() if name == "prefix" else nn.Sequential(nn.Linear(64, 64))
    veneer.attach(model, name, **({} if name == "prefix" else {"to": ["0"]}))

    def held():
        return {
            n: t.dtype
            for _, d in changes(model, "default")
            for n, t in [*d.named_parameters(), *d.named_buffers()]
        }

    before = held()
    model.to(dtype)
    wanted = torch.promote_types(dtype, torch.float32)
    assert held() == {n: wanted if t.is_floating_point else t for n, t in before.items()}

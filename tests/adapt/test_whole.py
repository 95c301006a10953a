"""Modules kept whole act with all arguments or are refused, and merge into their owner alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from support.models import SIZES
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.errors import FormatError, NotMergeable, SiteError

IDS = torch.randint(3, 90, (1, 16), generator=torch.Generator().manual_seed(1))


class Gated(nn.Module):
    """A norm that takes a gate, by place or by name, and returns a pair."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x, gate=None, *, power=1):
        y = self.weight * x + self.bias
        return y * gate.sigmoid() ** power, y


class Owner(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner, self.norm, self.how = nn.Linear(8, 8), Gated(), how

    def forward(self, x):
        h = self.inner(x)
        if self.how == "by place":
            return self.norm(h, x)[0]
        if self.how == "by name":
            return sum(self.norm(x=h, gate=x, power=2))
        return self.norm.weight * h + self.norm.bias


def moved(how):
    """The owner with a whole change of its norm, and the same with the norm's weights written."""
    torch.manual_seed(0)
    model = Owner(how).double()
    written = copy.deepcopy(model)
    veneer.attach(model, "full", to=["norm"])
    ((site, delta),) = changes(model, "default")
    with torch.no_grad():
        delta.D.normal_()
        for n, part in site.split(site.weight() + delta.D).items():
            written.norm.get_parameter(n).copy_(part)
    return model, written, torch.randn(3, 8).double()


@pytest.mark.parametrize("how", ["by place", "by name"])
def test_all_arguments_and_outputs_of_a_whole_module_are_its_own(how):
    model, written, x = moved(how)
    torch.testing.assert_close(model(x), written(x), rtol=0, atol=0)
    base = copy.deepcopy(written)
    base.norm = Gated().double()
    with veneer.using(model):
        assert torch.equal(model(x), base(x))
    with veneer.using(model, {"default": 0.25}):
        y = model(x)
    assert veneer.merge(copy.deepcopy(model), {"default": 0.25}).error < 1e-12
    half = copy.deepcopy(model)
    veneer.merge(half, {"default": 0.25})
    torch.testing.assert_close(half(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["by place", "by name"])
def test_a_whole_module_learns_as_its_weights_would(how):
    model, written, x = moved(how)
    model(x).square().sum().backward()
    written(x).square().sum().backward()
    (D,) = (p for n, p in model.named_parameters() if "deltas" in n)
    wanted = torch.cat([p.grad.reshape(-1) for p in written.norm.parameters()])
    torch.testing.assert_close(D.grad.flatten(), wanted, rtol=1e-12, atol=1e-12)


def test_a_module_that_fails_gets_its_weights_back():
    model, _, x = moved("by place")
    own = dict(model.norm.named_parameters(recurse=False))
    with pytest.raises(RuntimeError):
        model.norm(x, torch.zeros(3, 5))
    assert all(model.norm.get_parameter(n) is p for n, p in own.items())
    veneer.detach(model)
    assert not model.norm._forward_hooks and not model.norm._forward_pre_hooks
    assert not model.norm._forward_hooks_always_called


def test_running_statistics_move_once_a_step():
    model = nn.Sequential(nn.BatchNorm1d(4)).train()
    veneer.attach(model, "full")
    alone = nn.BatchNorm1d(4).train()
    x = torch.randn(6, 4)
    model(x), alone(x)
    torch.testing.assert_close(model[0].running_mean, alone.running_mean, rtol=0, atol=0)


def test_a_recurrent_layer_is_one_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(4, 3)).double()
    written, x = copy.deepcopy(model), torch.randn(5, 2, 4).double()
    veneer.attach(model, "full")
    ((site, delta),) = changes(model, "default")
    with torch.no_grad():
        delta.D.normal_(std=0.3)
        for n, part in site.split(site.weight() + delta.D).items():
            written[0].get_parameter(n).copy_(part)
    torch.testing.assert_close(model(x)[0], written(x)[0], rtol=0, atol=0)
    with veneer.using(model):
        assert not torch.equal(model(x)[0], written(x)[0])


def test_whole_modules_act_under_a_compiler():
    model, written, x = moved("by place")
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), written(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        changes(model, "default")[0][1].D.zero_()
    with veneer.using(model):
        base = model(x)
    torch.testing.assert_close(compiled(x), base, rtol=1e-12, atol=1e-12)


def test_a_module_read_by_its_owner_is_named_in_the_first_step():
    model, _, x = moved("directly")
    model.train()
    with pytest.raises(SiteError, match=r"1 adapted layers were never called .* norm"):
        model(x)


# Files of others


def by_peft(make, **options):
    """A PEFT adapter with random numbers: its folder, its logits, and the untouched base."""
    torch.manual_seed(0)
    base = make().eval()
    state = {n: t.clone() for n, t in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    torch.manual_seed(5)
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.normal_(std=0.3)
        elif "modules_to_save" in n:
            p.data.add_(torch.randn_like(p) * 0.3)
    fresh = make().eval()
    fresh.load_state_dict(state)
    return model.eval(), fresh


def logits(model):
    return model(input_ids=IDS).logits.detach()


def bamba():
    own = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=4, mamba_expand=2)
    return T.BambaForCausalLM(T.BambaConfig(**SIZES, **own, attn_layer_indices=[1], mamba_chunk_size=8))


def mamba2():
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, expand=2)
    return T.Mamba2ForCausalLM(T.Mamba2Config(**sizes, state_size=4, n_groups=1, chunk_size=8))


def mixtral():
    return T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=4))


KEPT = {
    "Bamba's gated norm": (bamba, ["q_proj"], ["mamba.norm"]),
    "Mamba-2's gated norm": (mamba2, ["in_proj"], ["mixer.norm"]),
    "Mixtral's router": (mixtral, ["q_proj"], ["mlp.gate"]),
    "Mamba-2's convolution": (mamba2, ["in_proj"], ["conv1d"]),
}


@pytest.mark.parametrize("kind", KEPT)
def test_modules_that_peft_keeps_act_as_there_or_are_refused(kind, tmp_path):
    make, targets, whole = KEPT[kind]
    model, base = by_peft(make, target_modules=targets, modules_to_save=whole)
    model.save_pretrained(tmp_path)
    try:
        veneer.load(base, tmp_path)
    except FormatError as e:
        assert whole[0].rpartition(".")[2] in str(e)
        assert not veneer.adapters(base)
        return
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_tied_weights_kept_whole_merge_into_their_owner_alone(kept, tmp_path):
    def make():
        return T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=True))

    model, base = by_peft(make, target_modules=["q_proj"], modules_to_save=kept)
    model.save_pretrained(tmp_path / "adapter")
    veneer.load(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)
    veneer.merge(base)
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    base.save_pretrained(tmp_path / "merged")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def tied(same):
    """A tied model with whole changes of both ends: one change of the shared weight, or two."""
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    veneer.attach(model, "full", to=["embed_tokens", "lm_head"])
    found = [delta for _, delta in changes(model, "default")]
    with torch.no_grad():
        found[0].D.normal_(std=0.3)
        found[1].D.copy_(found[0].D if same else torch.randn_like(found[0].D) * 0.3)
    return model


def test_one_change_of_a_tied_weight_keeps_the_tie():
    model = tied(same=True)
    y = logits(model)
    veneer.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-5)


def test_a_refused_merge_leaves_ties_as_they_were(monkeypatch):
    model = tied(same=False)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.bfloat16()
        for _, delta in changes(model, "default"):
            delta.D.mul_(1e-4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(NotMergeable):
        veneer.merge(model, limit=0.0)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class Doubled(nn.Module):
    """A weight that acts by its layer and by a read beside it: what a merge adds acts twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.layer(x) + x @ self.layer.weight


def test_a_loss_that_is_no_rounding_is_not_called_rounding():
    torch.manual_seed(0)
    model = veneer.attach(Doubled().double(), "lora", to=["layer"], rank=2)
    with torch.no_grad():
        changes(model, "default")[0][1].B.normal_()
    with pytest.raises(
        NotMergeable, match=r"hold the change up to 0\.0%.*the model reads these weights elsewhere"
    ):
        veneer.merge(model, probe={"x": torch.randn(4, 6).double()})


def test_a_loaded_change_that_its_owner_reads_around_is_refused(tmp_path):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = T.PretrainedConfig(vocab_size=20, max_position_embeddings=8)
            self.embed, self.used, self.read = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids):
            h = self.used(self.embed(input_ids))
            return nn.functional.linear(h, self.read.weight, self.read.bias) + self.embed.weight.sum() * 0

    torch.manual_seed(0)
    base = Reader()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["used", "read", "embed"], r=2))
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"reads the weights of read itself and does not call these layers"):
        veneer.load(base, tmp_path)
    assert not veneer.adapters(base)
    assert all(type(m._parameters) is dict and not m._forward_pre_hooks for m in base.modules())


def test_errors_in_a_probe_are_not_swallowed(tmp_path):
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).eval()
    veneer.attach(model, "lora", to=["q_proj"], rank=2)
    with torch.no_grad():
        for _, delta in changes(model, "default"):
            delta.B.normal_()

    def fail(module, args, output):
        if veneer.active(model):
            raise RuntimeError("the adapter does not fit the layer")

    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="does not fit the layer"):
        veneer.save(model, tmp_path / "a")
    handle.remove()
    veneer.save(model, tmp_path / "a")

"""BitFit and bottleneck adapters on models: which layers, what they compute, what they cannot."""

from __future__ import annotations

import pytest
import torch
from support import tiny
from support.models import bert, conv_net, gpt2, inputs, llama, output, randomise
from torch import nn
from transformers import AutoModelForCausalLM

import veneer
from veneer import methods
from veneer.adapt.attached import base_parameters, changes
from veneer.adapt.merge import merge
from veneer.errors import ConfigError, NotMergeable, SiteError
from veneer.runs.fit import fit
from veneer.sites import BiasSite, BlockSite, LeafSite, site_for
from veneer.train.run import Run

IDS = torch.arange(10)[None]


def names(model, name="default"):
    return [s.name for s, _ in changes(model, name)]


def test_bitfit_trains_every_bias_and_nothing_else():
    model = veneer.attach(bert(), "bitfit")
    biases = [n.removesuffix(".bias") for n, _ in bert().named_parameters() if n.endswith(".bias")]
    assert names(model) == biases
    base = output(bert())
    assert torch.equal(output(model), base)
    randomise(model)
    twin = bert()
    with torch.no_grad():
        for site, delta in changes(model, "default"):
            twin.get_submodule(site.name).bias += delta.d
    torch.testing.assert_close(output(model), output(twin))
    with veneer.using(model):
        assert torch.equal(output(model), base)
    with veneer.using(model, {"default": 0.5}):
        half = output(model)
    merge(model, {"default": 0.5}, probe={})
    torch.testing.assert_close(output(model), half)
    assert not any(m._forward_hooks for m in model.modules())


def test_bitfit_on_convolutions_adds_to_their_channels():
    net = veneer.attach(conv_net(), "bitfit")
    assert names(net) == ["first", "line", "head"]  # the second has none
    randomise(net)
    y = output(net)
    merge(net, probe={})
    torch.testing.assert_close(output(net), y)


def test_a_model_without_biases_is_given_some_where_one_says_so(tmp_path):
    with pytest.raises(
        SiteError,
        match=r"LlamaForCausalLM has no bias to train; to='all-linear' gives every linear layer one",
    ):
        veneer.attach(llama(), "bitfit")
    model = veneer.attach(llama(), "bitfit", to="all-linear")
    assert len(names(model)) == 14
    randomise(model)
    veneer.save(model, tmp_path)
    y = output(model)
    assert torch.equal(output(veneer.load(llama(), tmp_path)), y)
    with pytest.raises(
        NotMergeable, match=r"'model.layers.0.self_attn.q_proj' has no bias to write to; keep the adapter"
    ):
        merge(model, probe={})
    assert torch.equal(output(model), y)


def test_bitfit_on_named_modules_and_beside_others():
    model = veneer.attach(gpt2(), "bitfit", to=["ln_1", "c_fc"], exclude=r".*h\.0\.ln_1")
    assert names(model) == ["transformer.h.0.mlp.c_fc", "transformer.h.1.ln_1", "transformer.h.1.mlp.c_fc"]
    with pytest.raises(
        SiteError, match=r"another adapter holds transformer.h.0.mlp.c_fc, .* as a site of another kind"
    ):
        veneer.attach(model, "lora", to=["c_fc"], rank=2, name="other")
    assert veneer.adapters(model) == ["default"]
    with pytest.raises(SiteError, match="no module that fits is called 'act'"):  # it has no parameters
        veneer.attach(gpt2(), "full", to=["act"])
    with pytest.raises(
        SiteError, match=r"no module that fits is called 'ln_7'; there are e.g. transformer.wte"
    ):
        veneer.attach(gpt2(), "bitfit", to=["ln_7"])


PLACED = {
    "houlsby": ("self_attn.o_proj", "mlp.down_proj"),
    "pfeiffer": ("mlp.down_proj",),
    "parallel": ("mlp",),
}


@pytest.mark.parametrize("placement", PLACED)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_a_bottleneck_sits_where_its_paper_says(placement, activation, tmp_path):
    model = veneer.attach(llama(), "bottleneck", rank=5, placement=placement, activation=activation)
    assert {n.split(".", 3)[-1] for n in names(model)} == set(PLACED[placement])
    assert sum(p.numel() for _, d in changes(model, "default") for p in d.parameters()) == len(
        names(model)
    ) * (2 * 32 * 5 + 5 + 32)
    base = output(llama())
    assert torch.equal(output(model), base)
    randomise(model)
    y = output(model)
    twin = llama()
    f = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}[activation]
    for site, d in changes(model, "default"):
        inner = twin.get_submodule(site.name).forward

        def wrapped(x, inner=inner, d=d):
            h = inner(x)
            z = x if placement == "parallel" else h
            return h + (4 if placement == "parallel" else 1) * (f(z @ d.D.T + d.a) @ d.U.T + d.u)

        twin.get_submodule(site.name).forward = wrapped
    torch.testing.assert_close(y, output(twin), rtol=1e-4, atol=1e-5)
    veneer.save(model, tmp_path)
    assert torch.equal(output(veneer.load(llama(), tmp_path)), y)
    with pytest.raises(NotMergeable, match=r"the bottleneck at '.*' is nonlinear and cannot be merged"):
        merge(model)
    assert torch.equal(output(model), y)
    with veneer.using(model, {"default": 0.0}):
        torch.testing.assert_close(output(model), base)


def test_a_bottleneck_trains_alone_and_beside_lora():
    model = veneer.attach(llama(), "bottleneck", rank=3, placement="parallel", dropout=0.1).train()
    model(**inputs(model)).logits.square().mean().backward()
    got = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.grad is not None}
    assert got == {"D", "a", "U", "u"}
    veneer.attach(model, "lora", rank=2, name="other")
    randomise(model, "other")
    with pytest.raises(NotMergeable):
        merge(model)


def test_bottlenecks_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"unknown placement 'pfeifer'; did you mean 'pfeiffer'\?"):
        veneer.attach(llama(), "bottleneck", placement="pfeifer")
    with pytest.raises(ConfigError, match=r"unknown activation 'tanh'; known"):
        veneer.attach(llama(), "bottleneck", activation="tanh")
    with pytest.raises(
        SiteError,
        match=r"the layers of the end of the attention block .* are not known in a ConvNet; name"
        r" them with to=",
    ):
        veneer.attach(conv_net(), "bottleneck")
    with pytest.raises(
        SiteError, match="a houlsby adapter needs vectors; 'first' is of kind 'conv': exclude it"
    ):
        veneer.attach(conv_net(), "bottleneck", to=["first"])
    with pytest.raises(SiteError, match=r"no module that fits is called 'down_proj'"):
        veneer.attach(llama(), "bottleneck", to=["down_proj"], placement="parallel")  # a layer is no block
    model = veneer.attach(llama(), "bottleneck", to=["self_attn"], placement="parallel")
    with pytest.raises(
        SiteError, match=r"'model.layers.0.self_attn' returns a tuple; only layers returning a tensor"
    ):
        output(model)


def test_full_fine_tuning_of_the_last_layer_alone(tmp_path):
    given = tiny.settings(
        tmp_path, method="full", options={}, to=r"model\.(layers\.1|norm)", steps=3, lr=1e-2
    )
    fit(Run.from_dict(given), progress=False)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = veneer.load(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run" / "adapter")
    changed = set(names(model))
    assert changed == {
        n
        for n, m in before.named_modules()
        if n.startswith(("model.layers.1.", "model.norm")) and m._parameters
    }
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in base_parameters(model).items())
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, before(IDS).logits)


class Odd(nn.Module):
    """A module whose bias is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 2))


def test_biases_are_vectors_of_a_module_itself():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False), nn.LayerNorm(2), Odd())
    find = methods.get("bitfit").find
    assert [s.name for s in find(model, None)] == ["0", "2"]
    assert [s.name for s in find(model, ["0", "1", "2"])] == ["0", "1", "2"]
    assert [s.name for s in find(model, "all-linear")] == ["0", "1"]
    assert all(isinstance(s, BiasSite) for s in find(model, None))


def test_full_fine_tuning_takes_every_module_with_parameters_of_its_own():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)), Odd())
    find = methods.get("full").find
    assert [s.name for s in find(model, None)] == ["0", "2.0", "2.1", "3"]
    assert [s.name for s in find(model, ["2"])] == ["2.0", "2.1"]
    assert [s.name for s in find(model, "all-linear")] == ["0", "2.1"]
    assert all(isinstance(s, LeafSite) for s in find(model, None))


def test_a_parallel_bottleneck_reads_the_input_and_has_its_scale():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    options = {"rank": 3, "placement": "parallel"}
    delta = methods.build(methods.get("bottleneck"), BlockSite("mlp", block), options)
    assert delta.D.shape == (3, 6) and delta.U.shape == (4, 3) and delta.scaling == 4.0
    assert float(delta.D.detach().abs().max()) <= 6**-0.5
    own = methods.build(methods.get("bottleneck"), BlockSite("mlp", block), {**options, "scaling": 0.5})
    assert own.scaling == 0.5
    assert (
        methods.build(methods.get("bottleneck"), site_for("0", nn.Linear(6, 4)), {"rank": 3}).scaling == 1.0
    )


def test_a_bottleneck_of_a_block_is_parallel_and_of_a_layer_may_be(monkeypatch):
    kind, block = methods.get("bottleneck"), nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    for placement in ("houlsby", "pfeiffer"):
        with pytest.raises(SiteError, match=f"a {placement} adapter needs vectors; 'mlp' is of kind 'block'"):
            methods.build(kind, BlockSite("mlp", block), {"placement": placement, "rank": 2})
    for layer in (nn.Embedding(6, 4), nn.Conv1d(6, 4, 1)):
        with pytest.raises(SiteError, match="a parallel adapter needs vectors"):
            methods.build(kind, site_for("0", layer), {"placement": "parallel", "rank": 2})
    site = site_for("0", nn.Linear(6, 4).double())
    delta = methods.build(kind, site, {"placement": "parallel", "rank": 2, "scaling": 0.5})
    randomise_change(delta)
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = 0.5 * (torch.relu(x @ delta.D.mT + delta.a) @ delta.U.mT + delta.u)
    torch.testing.assert_close(delta(x, y, site), expected)
    monkeypatch.setattr(type(site), "acts_by_hook", False)  # as where a block reads the weight itself
    with pytest.raises(SiteError, match="a houlsby adapter needs vectors"):
        methods.build(kind, site, {"rank": 2})


def randomise_change(delta):
    with torch.no_grad():
        for p in delta.parameters():
            p.copy_(torch.randn(p.shape))

"""(IA)3 on a model: which layers, what it computes, PEFT's, and what cannot be merged."""

from __future__ import annotations

import peft
import pytest
import torch
from support.models import bert, conv_net, gpt2, llama, output, randomise
from support.peer import agrees_with_peft
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.merge import merge
from veneer.errors import NotMergeable, SiteError


def test_keys_values_and_the_hidden_numbers_are_its_own_choice():
    model = veneer.attach(llama(), "ia3")
    assert {s.name.rsplit(".", 1)[-1] for s, _ in changes(model, "default")} == {
        "k_proj",
        "v_proj",
        "down_proj",
    }
    assert sum(d.l.numel() for _, d in changes(model, "default")) == 2 * (16 + 16 + 48)
    names = {s.name.split(".", 4)[-1] for s, _ in changes(veneer.attach(bert(), "ia3"), "default")}
    assert names == {"attention.self.key", "attention.self.value", "output.dense"}


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_are_multiplied_bias_and_all(bias):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=bias).double()
    model = veneer.attach(nn.Sequential(layer), "ia3", to=["0"])
    x, plain = torch.randn(3, 5).double(), layer.weight.detach().clone()
    randomise(model)
    (gain,) = (d.l for _, d in changes(model, "default"))
    expected = gain * (x @ plain.mT + (layer.bias if bias else 0))
    torch.testing.assert_close(model(x), expected)
    with veneer.using(model, {"default": 0.5}):
        torch.testing.assert_close(
            model(x), (1 + (gain - 1) / 2) * (x @ plain.mT + (layer.bias if bias else 0))
        )
    if bias:
        with pytest.raises(
            NotMergeable,
            match=r"multiplies the bias of '0' too, so it cannot be merged .* keep it as an adapter",
        ):
            merge(model, probe={})
        assert torch.equal(layer.weight, plain)
    else:
        merge(model, probe={})
        torch.testing.assert_close(model(x), expected)


def test_same_outputs_gradients_and_files_as_peft(tmp_path):
    where = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(target_modules=where, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    agrees_with_peft(tmp_path / "llama", "ia3", {}, where, config)
    where = ["attn.c_attn", "mlp.c_proj"]
    config = peft.IA3Config(
        target_modules=where, feedforward_modules=["mlp.c_proj"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    agrees_with_peft(
        tmp_path / "gpt2", "ia3", {"feedforward": "transformer.*mlp.c_proj"}, where, config, gpt2
    )


def test_it_dials_stacks_and_comes_off_a_whole_model():
    model = veneer.attach(llama(), "ia3", name="a")
    base = output(llama())
    assert torch.equal(output(model), base)
    randomise(model, "a")
    veneer.attach(model, "lora", rank=2, name="b")
    randomise(model, "b")
    with veneer.using(model, "a", {"b": 0.5}):
        y = output(model)
        merge(model, "a", {"b": 0.5}, probe={})
    torch.testing.assert_close(output(model), y, rtol=1e-4, atol=1e-4)


def test_models_whose_layers_are_not_known_are_refused():
    with pytest.raises(
        SiteError,
        match=r"the layers of keys and values and the end of the feed-forward block are not known"
        r" in a ConvNet",
    ):
        veneer.attach(conv_net(), "ia3")
    with pytest.raises(
        SiteError,
        match=r"the layers of keys and values are not known in a GPT2LMHeadModel; name all of them with to=",
    ):
        veneer.attach(gpt2(), "ia3")


def test_a_gain_of_inputs_is_one_product_with_the_input(monkeypatch):
    model = veneer.attach(nn.Sequential(nn.Linear(4, 3, bias=False)), "ia3", to=["0"], feedforward=("0",))
    randomise(model)
    x = torch.randn(2, 4)
    delta = changes(model, "default")[0][1]
    monkeypatch.setattr(type(delta), "delta", lambda *a: pytest.fail("W' - W was made"))
    torch.testing.assert_close(model(x), (x * delta.l) @ model[0].weight.T)

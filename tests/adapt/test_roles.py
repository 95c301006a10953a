"""Layers by role: the same word names the same kind of layer in every family of models."""

from __future__ import annotations

import pytest
import torch
from support import families
from torch import nn

import veneer
from veneer.errors import SiteError
from veneer.sites import find

ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "bert": {"query", "key", "value", "dense"},
    "t5": {"q", "k", "v", "o"},
    "whisper": {"q_proj", "k_proj", "v_proj", "out_proj"},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_and_mlp_share_no_layer_and_are_all_linear_together(name):
    model = families.build(name)
    parts = {role: {s.name for s in find(model, role)} for role in ("attention", "mlp")}
    every = {s.name for s in find(model, "all-linear")}
    assert {n.rsplit(".", 1)[-1] for n in parts["attention"]} == ATTENTION[name]
    assert not parts["attention"] & parts["mlp"] and parts["attention"] | parts["mlp"] == every


@pytest.mark.parametrize(
    ("name", "roles"), [("whisper", ("encoder", "decoder")), ("clip", ("text", "vision"))]
)
def test_the_two_halves_of_a_model(name, roles):
    model = families.build(name)
    first, second = ({s.name for s in find(model, role)} for role in roles)
    assert first and second and not first & second
    both = {s.name for s in find(model, list(roles))}
    assert both == first | second
    left = {s.name for s in find(model, "all-linear", exclude=roles[0])}
    assert not left & first and second <= left


def test_a_role_beside_a_name_and_in_attach():
    model = families.build("llama")
    names = {s.name for s in find(model, ["attention", "down_proj"])}
    assert {n.rsplit(".", 1)[-1] for n in names} == ATTENTION["llama"] | {"down_proj"}
    veneer.attach(model, "lora", to="mlp", rank=2)
    assert {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad} == {"mlp"}


def test_a_layer_of_that_name_is_meant_first():
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 4), "other": torch.nn.Linear(4, 4)})
    assert [s.name for s in find(model, "mlp")] == ["mlp"]
    assert [s.name for s in find(model, ["mlp"])] == ["mlp"]


def test_a_role_that_no_layer_plays():
    with pytest.raises(
        SiteError, match="no layer of a LlamaForCausalLM plays the role 'vision'; name layers"
    ):
        find(families.build("llama"), "vision")
    odd = nn.ModuleDict({"experts": nn.Module(), "q": nn.Linear(8, 8)})
    odd["experts"].w1 = nn.Parameter(torch.randn(4, 8, 8))
    with pytest.raises(SiteError, match=r"the experts are parameters of 'experts' in an unknown layout"):
        find(odd, ["experts"])
    assert {n.split(".")[4] for n in (s.name for s in find(families.build("qwen2-moe"), "experts"))} == {
        "experts",
        "shared_expert",
    }

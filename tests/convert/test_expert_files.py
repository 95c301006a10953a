"""Factors of fused experts in vLLM's layouts: the change stays the same, and stacks keep PEFT's order."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import experts

import veneer
from veneer.adapt.attached import changes
from veneer.convert.base import Base
from veneer.convert.dialects import vllm
from veneer.convert.experts import apart, together
from veneer.convert.pairs import Pair, Pairs

LEAD = "base_model.model.model.layers.1.mlp.experts."


def written(kind, folder):
    """Returns our adapter, the tensors that vLLM gets, and its settings."""
    model = experts.shake(veneer.attach(experts.model(kind), "lora", to="experts", rank=8, alpha=4))
    sites = {s.name: Pair(d.A.detach(), d.B.detach(), d.scaling) for s, d in changes(model, "default")}
    vllm.write(Pairs(sites), folder, Base(kind=kind))
    config = json.loads((folder / "adapter_config.json").read_text())
    return model, load_file(folder / "adapter_model.safetensors"), config


def test_each_expert_has_its_own_pairs(tmp_path):
    model, tensors, config = written("qwen3_moe", tmp_path)
    assert {n.rsplit(".", 1)[-1] for n in config["target_modules"]} == {"gate_proj", "up_proj", "down_proj"}
    assert len(tensors) == 2 * 4 * 3 * 2
    by_name = {s.name: d.delta(s) for s, d in changes(model, "default")}
    for e in range(4):
        gate, up, down = (
            tensors[f"{LEAD}{e}.{n}_proj.lora_B.weight"] @ tensors[f"{LEAD}{e}.{n}_proj.lora_A.weight"]
            for n in ("gate", "up", "down")
        )
        lead = f"model.layers.1.mlp.experts.{e}."
        torch.testing.assert_close(torch.cat([gate, up]), by_name[f"{lead}gate_up_proj"])
        torch.testing.assert_close(down, by_name[f"{lead}down_proj"])


def of_expert(model):
    return next(c for c in changes(model, "default") if c[0].name.endswith("1.mlp.experts.2.gate_up_proj"))


def test_pairs_of_each_expert_are_read_into_the_fused_ones(tmp_path):
    model, _, _ = written("qwen3_moe", tmp_path)
    loaded = veneer.load(experts.model("qwen3_moe"), tmp_path)
    torch.testing.assert_close(experts.logits(loaded), experts.logits(model), rtol=1e-5, atol=1e-6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in [k for k in tensors if ".up_proj." in k]:  # trained apart: gate and up have other factors
        tensors[key] = torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(1)) * 0.1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    trained_apart = veneer.load(experts.model("qwen3_moe"), tmp_path)
    site, delta = of_expert(trained_apart)
    rows = [
        tensors[f"{LEAD}2.{n}.lora_B.weight"] @ tensors[f"{LEAD}2.{n}.lora_A.weight"]
        for n in ("gate_proj", "up_proj")
    ]
    torch.testing.assert_close(delta.delta(site), torch.cat(rows))
    for key in [k for k in tensors if ".up_proj." in k]:
        del tensors[key]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    half = veneer.load(experts.model("qwen3_moe"), tmp_path, allow="targets")  # which name up_proj still
    site, delta = of_expert(half)
    torch.testing.assert_close(delta.delta(site), torch.cat([rows[0], torch.zeros_like(rows[1])]))


def test_models_that_take_stacks_get_peft_s(tmp_path):
    model, tensors, config = written("gpt_oss", tmp_path)
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    by_name = {s.name: d.delta(s) for s, d in changes(model, "default")}
    for inner, name in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
        A, B = (tensors[f"{LEAD}{inner}lora_{x}.weight"] for x in "AB")
        for e in range(4):  # vLLM's view of a stack: A (E, r, in), B (out, r, E)
            change = B.reshape(-1, 8, 4)[:, :, e] @ A.reshape(4, 8, -1)[e]
            torch.testing.assert_close(change, by_name[f"model.layers.1.mlp.experts.{e}.{name}"])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gate_and_up_there_and_back(interleaved, shared):
    torch.manual_seed(0)
    pair = Pair(torch.randn(3, 11), torch.randn(14, 3), 0.5)
    parts = apart({"mlp.experts.2.gate_up_proj": pair}, interleaved=interleaved)
    gate, up = parts["mlp.experts.2.gate_proj"], parts["mlp.experts.2.up_proj"]
    rows = pair.product()
    torch.testing.assert_close(gate.product(), rows[::2] if interleaved else rows[:7])
    if not shared:
        up = Pair(torch.cat([up.A, up.A]), torch.cat([up.B, 2 * up.B], 1), up.scaling / 3)
    back = together(gate, up, interleaved=interleaved)
    assert back.rank == (3 if shared else 9)
    torch.testing.assert_close(back.product(), pair.product())

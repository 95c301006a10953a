"""torchtune's formats."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.pairs import BASE, draw, llama_pairs, pair, same

from veneer.convert import Base, Pairs, detect, read, write
from veneer.errors import ConfigError, FormatError


def turned(B: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of transformers' order (i with i + half) in Meta's (2i with 2i + 1), one by one."""
    head = B.shape[0] // heads
    rows = torch.empty_like(B)
    for h in range(heads):
        for i in range(head // 2):
            rows[h * head + 2 * i] = B[h * head + i]
            rows[h * head + 2 * i + 1] = B[h * head + i + head // 2]
    return rows


def test_torchtune_turns_the_rows_of_q_and_k(tmp_path):
    pairs = llama_pairs(dora=True)
    write(pairs, tmp_path / "x", "torchtune", base=BASE)
    file = load_file(tmp_path / "x" / "adapter_model.safetensors")
    q, k, v = (pairs.sites[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv")
    assert torch.equal(file["layers.0.attn.q_proj.lora_b.weight"], turned(q.B, 4))
    assert torch.equal(file["layers.0.attn.k_proj.lora_b.weight"], turned(k.B, 2))
    assert torch.equal(file["layers.0.attn.k_proj.magnitude"], turned(k.magnitude, 2))
    assert torch.equal(file["layers.0.attn.v_proj.lora_b.weight"], v.B)
    assert torch.equal(file["layers.0.attn.q_proj.lora_a.weight"], q.A)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config == {
        "r": 4,
        "lora_alpha": 8.0,
        "base_model_name_or_path": "owner/tiny",
        "target_modules": sorted(["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"]),
    }


def test_torchtune_leaves_qwen_as_it_is(tmp_path):
    pairs = llama_pairs()
    qwen = Base(heads=4, kv_heads=2, head=8, kind="qwen2")
    write(pairs, tmp_path / "x", "torchtune", base=qwen)
    q = pairs.sites["model.layers.0.self_attn.q_proj"]
    assert torch.equal(
        load_file(tmp_path / "x" / "adapter_model.safetensors")["layers.0.attn.q_proj.lora_b.weight"], q.B
    )
    same(pairs, read(tmp_path / "x", base=qwen))


def test_torchtune_needs_the_heads(tmp_path):
    write(llama_pairs(), tmp_path / "x", "torchtune", base=BASE)
    with pytest.raises(
        ConfigError,
        match=(
            "torchtune orders the rows of q and k by attention heads; kind, heads, kv_heads, head of the base"
            " model"
        ),
    ):
        read(tmp_path / "x")
    with pytest.raises(
        FormatError,
        match=r"q_proj must have 64 rows \(8 heads of 8\) to fit the base model, got 32; give the right base",
    ):
        read(tmp_path / "x", base=Base(heads=8, kv_heads=2, head=8, kind="llama"))
    with pytest.raises(
        FormatError,
        match="torchtune's order of the rows of q and k is unknown for bloom models; known: llama, ",
    ):
        read(tmp_path / "x", base=Base(heads=4, kv_heads=2, head=8, kind="bloom"))
    # which torchtune puts beside its adapters
    models.llama().config.to_json_file(tmp_path / "x" / "config.json")
    same(llama_pairs(), read(tmp_path / "x"))


def export(pairs: Pairs, folder) -> None:
    """Writes torchtune's export for PEFT: PEFT's names with three settings."""
    write(pairs, folder, "peft")
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "w1"]})
    )


def test_torchtunes_export_is_read_as_far_as_it_is_right(tmp_path):
    """torchtune 2025: settings without base_model_name_or_path are no error."""
    export(llama_pairs(), tmp_path / "x")
    assert detect(tmp_path / "x").dialect == "torchtune"
    same(llama_pairs(), read(tmp_path / "x"))
    with pytest.raises(
        FormatError,
        match=(
            "torchtune's export reorders the rows of q and k of qwen2 models wrongly; read the folder with"
            " adapter_mo"
        ),
    ):
        read(tmp_path / "x", base=Base(kind="qwen2"))
    export(llama_pairs(dora=True), tmp_path / "y")
    with pytest.raises(
        FormatError, match="torchtune's export orders the magnitudes of q and k unlike the rows"
    ):
        read(tmp_path / "y")
    write(llama_pairs(dora=True), tmp_path / "z", "torchtune", base=BASE)
    torch.save(load_file(tmp_path / "z" / "adapter_model.safetensors"), tmp_path / "y" / "adapter_model.pt")
    same(llama_pairs(dora=True), read(tmp_path / "y", base=BASE))  # its own form is preferred


def test_torchtune_does_not_adapt(tmp_path):
    with pytest.raises(FormatError, match=r"torchtune does not adapt transformer\.h\.0\.attn\.c_attn"):
        write(Pairs({"transformer.h.0.attn.c_attn": pair(4, 4)}), tmp_path / "x", "torchtune", base=BASE)
    save_file(
        {"layers.0.attn.z.lora_a.weight": draw(4, 4), "layers.0.attn.z.lora_b.weight": draw(4, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "target_modules": []}))
    with pytest.raises(FormatError, match=r"unknown torchtune module 'layers\.0\.attn\.z'"):
        read(tmp_path, base=BASE)

"""convert, convert-config and verify from the command line, on folders."""

from __future__ import annotations

import json

import pytest
from support.adapters import llama, shake
from support.tiny import tokenizer

import veneer
from veneer.cli.frame import main
from veneer.files import read_tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base model and a LoRA adapter made for it."""
    folder, model = tmp_path_factory.mktemp("exchange"), llama()
    tokenizer().save_pretrained(folder / "base")
    model.save_pretrained(folder / "base")
    veneer.attach(model, "lora", rank=3)
    shake(model)
    veneer.save(model, folder / "adapter")
    return folder


def test_an_adapter_goes_to_vllm_and_is_verified(root, capsys):
    assert main(["convert", f"{root}/adapter", "--to", "vllm", "--out", f"{root}/served", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    config = json.loads((root / "served" / "adapter_config.json").read_text())
    assert (
        config["r"] == config["lora_alpha"] == 8 and told["layers"] == 14
    )  # 3 is padded to a rank that vLLM takes
    assert all(8 in t.shape for t in read_tensors(root / "served" / "adapter_model.safetensors").values())
    for folder in ("adapter", "served"):
        assert main(["verify", f"{root}/{folder}", "--model", f"{root}/base"]) == 0
        assert "verified, 14 layers" in capsys.readouterr().out


def test_verify_says_no_for_another_base(root, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    other.save_pretrained(root / "other")
    assert main(["verify", f"{root}/adapter", "--model", f"{root}/other"]) == 3
    assert "NOT what it should be" in capsys.readouterr().out


def test_settings_of_another_program_become_a_run(tmp_path, capsys):
    (tmp_path / "axolotl.yml").write_text(
        "base_model: ./llama\nadapter: lora\nlora_r: 16\nlora_alpha: 32\nlearning_rate: 2e-4\n"
    )
    main(["convert-config", f"{tmp_path}/axolotl.yml", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["tool"] == "axolotl" and told["settings"]["options"]["rank"] == 16

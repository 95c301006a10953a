"""diffusers' format."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pairs import draw, llama_pairs

from veneer.convert import read, write
from veneer.convert.pairs import take_part
from veneer.convert.tensor_files import metadata
from veneer.errors import ConfigError, FormatError


def test_diffusers_of_any_age(tmp_path):
    """Names from before 0.17, before PEFT and today; alpha from a tensor, the header or the rank."""
    A, B = draw(2, 4), draw(4, 2)
    names = {
        "unet.attn1.processor.to_q_lora.down.weight": A,
        "unet.attn1.processor.to_q_lora.up.weight": B,
        "unet.attn1.processor.to_out_lora.down.weight": A,
        "unet.attn1.processor.to_out_lora.up.weight": B,
        "text_encoder.q_proj.lora_linear_layer.down.weight": A,
        "text_encoder.q_proj.lora_linear_layer.up.weight": B,
        "text_encoder.attn.to_out_lora.down.weight": A,
        "text_encoder.attn.to_out_lora.up.weight": B,
        "unet.proj.lora.down.weight": A,
        "unet.proj.lora.up.weight": B,
        "unet.proj.alpha": torch.tensor(1.0),
    }
    names = {n: t.clone() for n, t in names.items()}
    save_file(names, tmp_path / "x.safetensors")
    pairs = read(tmp_path / "x.safetensors")
    scalings = {n: p.scaling for n, p in pairs.sites.items()}
    ones = ("unet.attn1.to_q", "unet.attn1.to_out.0", "text_encoder.q_proj", "text_encoder.attn.out_proj")
    assert scalings == {**dict.fromkeys(ones, 1.0), "unet.proj": 0.5}
    header = {"unet.r": 2, "unet.lora_alpha": 8, "unet.use_rslora": False}
    save_file(names, tmp_path / "y.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    assert {n: p.scaling for n, p in read(tmp_path / "y.safetensors").sites.items()} == {
        n: 4.0 if "unet" in n else 1.0 for n in scalings
    }
    save_file(names, tmp_path / "z.safetensors", {"lora_adapter_metadata": "[1]"})
    with pytest.raises(FormatError, match="lora_adapter_metadata in the header is not a JSON object"):
        read(tmp_path / "z.safetensors")
    save_file(
        names,
        tmp_path / "w.safetensors",
        {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 3})},
    )
    with pytest.raises(FormatError, match=r"unet\.attn1\.to_out\.0: rank 2 in the file, 3 in its header"):
        read(tmp_path / "w.safetensors")


def test_diffusers_needs_a_part(tmp_path):
    with pytest.raises(
        ConfigError,
        match=(
            "diffusers' files name the part of the pipeline; give the part that this adapter changes:"
            " part='unet'"
        ),
    ):
        write(llama_pairs(), tmp_path / "x", "diffusers")


def test_diffusers_never_gets_pefts_prefix(tmp_path):
    """A file with it is read as holding nothing, and nobody says so."""
    write(take_part(llama_pairs(scaling=0.7), "unet"), tmp_path / "x", "diffusers")
    file = tmp_path / "x" / "pytorch_lora_weights.safetensors"
    assert all(k.startswith("unet.model.layers.") for k in load_file(file))
    header = json.loads(metadata(file)["lora_adapter_metadata"])
    assert (
        header["unet.r"] == 4
        and header["unet.lora_alpha"] == pytest.approx(2.8)
        and not header.get("unet.use_dora")
    )

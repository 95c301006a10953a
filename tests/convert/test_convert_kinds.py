"""PEFT's other kinds of adapters and Veneer's own, written as plain LoRA: against PEFT's outputs."""

from __future__ import annotations

import pytest
import torch
from support import models

import veneer
from veneer.convert import read
from veneer.errors import FormatError
from veneer.verbs.convert import convert

peft = pytest.importorskip("peft")
CLOSE = dict(rtol=0, atol=5e-5)  # logits of size 4 through two layers in float32
TO = ["q_proj", "v_proj", "down_proj"]
EXACT = {
    "miss": (peft.MissConfig(r=6, target_modules=TO), "MISS", 6),
    "miss mini": (peft.MissConfig(r=6, mini_r=4, init_weights="mini", target_modules=TO), "MISS", 6),
    "vera": (peft.VeraConfig(r=16, target_modules=TO), "VERA", 16),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the tiny Llama."""
    folder = tmp_path_factory.mktemp("base")
    models.llama().save_pretrained(folder)
    return str(folder)


def by_peft(config, folder) -> torch.Tensor:
    """A random adapter that PEFT has made and saved, and PEFT's own output with it."""
    model = peft.get_peft_model(models.llama(), config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=draw))
    model.save_pretrained(folder)
    return models.output(model)


def as_lora(folder) -> torch.Tensor:
    """The output with the converted adapter, as PEFT reads it."""
    model = peft.PeftModel.from_pretrained(models.llama(), folder)
    assert model.peft_config["default"].peft_type == "LORA"
    return models.output(model)


@pytest.mark.parametrize("kind", EXACT)
def test_what_is_a_product_is_written_exactly(tmp_path, base, kind):
    config, name, rank = EXACT[kind]
    want = by_peft(config, tmp_path / "a")
    command = f"veneer convert {tmp_path / 'a'} --to vllm --out OUT --model BASE"
    with pytest.raises(FormatError) as refused:
        convert(str(tmp_path / "a"), out=str(tmp_path / "o"), to="vllm")
    assert str(refused.value) == (
        f"{tmp_path / 'a' / 'adapter_model.safetensors'} is PEFT's {name}: the file has no factors of LoRA;"
        f" make them on the base's layers:\n  {command}"
    )
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "o"), to="vllm", model=base)
    assert (
        done.dialect == "peft"
        and done.notes[0] == f"PEFT's {name} is written as plain LoRA"
        and done.layers == 6
    )
    assert not any("cut" in note for note in done.notes) and done.ranks == [rank]
    torch.testing.assert_close(as_lora(tmp_path / "o"), want, **CLOSE)
    assert not torch.allclose(want, models.output(models.llama()), atol=1e-2)
    with pytest.raises(
        FormatError,
        match=f"peft_type '{name}' is not LoRA; its change must be factored on the base: give model=",
    ):
        read(tmp_path / "a")


def test_gains_are_no_product_and_can_be_cut_to_one(tmp_path, base):
    want = by_peft(peft.IA3Config(target_modules=TO, feedforward_modules=["down_proj"]), tmp_path / "a")
    with pytest.raises(FormatError) as refused:
        convert(str(tmp_path / "a"), out=str(tmp_path / "o"), to="vllm", model=base)
    assert str(refused.value) == (
        f"{tmp_path / 'a' / 'adapter_model.safetensors'} changes 'model.layers.0.self_attn.q_proj' by more"
        " than two factors; cut it to"
        " a rank, or keep it whole with to='veneer':\n"
        f"  veneer convert {tmp_path / 'a'} --to vllm --out OUT --model BASE"
        " --rank 64"
    )
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "o"), to="vllm", model=base, rank=32)
    assert "100.0% of its energy" in done.notes[1]
    torch.testing.assert_close(as_lora(tmp_path / "o"), want, **CLOSE)


def test_a_kind_that_is_not_read_is_named_with_what_would_do(tmp_path, base):
    by_peft(peft.LoHaConfig(r=2, target_modules=TO), tmp_path / "a")
    with pytest.raises(
        FormatError, match="is PEFT's LOHA: the file has no factors of LoRA; make them on the base's layers"
    ):
        convert(str(tmp_path / "a"), out=str(tmp_path / "o"), to="vllm")


@pytest.mark.parametrize("method", ["loraxs", "loldu"])
def test_factors_in_our_own_layout_are_written_exactly(tmp_path, base, method):
    model = veneer.attach(models.llama(), method, to=TO, rank=4)
    models.randomise(model)
    veneer.save(model, tmp_path / "a")
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "o"), model=base)
    assert done.notes == [f"{method} in Veneer's own layout is written as plain LoRA"]
    torch.testing.assert_close(as_lora(tmp_path / "o"), models.output(model), **CLOSE)

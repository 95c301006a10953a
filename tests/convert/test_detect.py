"""Dialects are detected by keys, and unsupported content is refused."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.pairs import ALL, BASE, edit, llama_pairs, pair, same, spoil

from veneer.adapt.attach import attach
from veneer.adapt.store import store
from veneer.convert import READERS, Pairs, detect, read, write
from veneer.convert.pairs import take_part
from veneer.errors import FormatError


def test_the_four_meanings_of_adapter_config(tmp_path):
    texts = {
        "peft": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
        "mlx": {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}},
        "torchtune": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
        "hub": {
            "config": {"architecture": "lora"},
            "model_type": "llama",
            "hidden_size": 32,
            "name": "x",
            "version": "adapters.1.2.0",
        },
    }
    from veneer.convert.detect import of_settings

    assert {said: of_settings(text) for said, text in texts.items()} == {said: said for said in texts}
    assert (
        of_settings({"fine_tune_type": "full", "lora_parameters": None})
        == of_settings({"lora_parameters": {}})
        == "mlx"
    )
    assert of_settings({"fine_tune_type": "lora"}) == "mlx" and of_settings({"rank": 4}) is None
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(texts["hub"]))
    with pytest.raises(
        FormatError,
        match=r"is written by AdapterHub's adapters library, which is not supported; merge the adapter there",
    ):
        detect(folder)


@pytest.mark.parametrize("to", sorted(READERS))
def test_dialects_are_told_by_keys_not_by_names(tmp_path, to):
    pairs = take_part(llama_pairs(), "unet") if to == "diffusers" else llama_pairs()
    write(pairs, tmp_path / "x", to, base=BASE)
    (file,) = [f for f in (tmp_path / "x").iterdir() if f.suffix not in (".json", ".yaml")]
    renamed = file.rename(tmp_path / "x" / "weights.dat")
    assert detect(tmp_path / "x").dialect == detect(renamed).dialect == to
    assert set(read(renamed, base=BASE).sites) == set(pairs.sites)


def test_what_is_no_adapter(tmp_path):
    with pytest.raises(FormatError, match="nothing does not exist; give a folder"):
        detect(tmp_path / "nothing")
    save_file({"model.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        FormatError,
        match=r"no adapter of a supported dialect: no tensor in model\.safetensors has a name of one",
    ):
        detect(tmp_path)


def test_several_adapters_in_a_folder(tmp_path):
    for name in ("a", "b"):
        write(llama_pairs(), tmp_path / name, "kohya")
        (tmp_path / name / "lora.safetensors").rename(tmp_path / f"{name}.safetensors")
        (tmp_path / name).rmdir()
    with pytest.raises(
        FormatError, match=r"holds several adapters; give the file of one: a\.safetensors, b\.safetensors"
    ):
        detect(tmp_path)
    assert detect(tmp_path / "b.safetensors").file.name == "b.safetensors"


def test_a_trainers_state_beside_the_adapter_does_not_matter(tmp_path):
    write(llama_pairs(), tmp_path / "x", "peft")
    torch.save({"state": {0: torch.zeros(1)}, "param_groups": [{"lr": 0.1}]}, tmp_path / "x" / "optimizer.pt")
    torch.save({"python": slice(3)}, tmp_path / "x" / "rng_state.pth")
    same(llama_pairs(), read(tmp_path / "x"))


def test_settings_and_tensors_of_different_programs(tmp_path):
    write(llama_pairs(), tmp_path / "x", "mlx")
    (tmp_path / "x" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": None})
    )
    with pytest.raises(
        FormatError, match=r"is written by PEFT, but the tensors in adapters\.safetensors have names of mlx"
    ):
        detect(tmp_path / "x")


@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "torchtune", "mlx"])
def test_unknown_tensors_are_an_error_unless_allowed(tmp_path, to):
    """diffusers 14005, 14088, 13998: keys dropped without a word."""
    pairs = take_part(llama_pairs(), "unet") if to == "diffusers" else llama_pairs()
    write(pairs, tmp_path / "x", to, base=BASE)
    spoil(tmp_path / "x", lambda t: t.update({"lm_head.extra": torch.zeros(2)}))
    with pytest.raises(FormatError) as e:
        read(tmp_path / "x", base=BASE)
    assert "holds entries that cannot be converted:\n- tensors" in str(e.value)
    assert "lm_head.extra" in str(e.value)
    assert str(e.value).endswith("to drop entries, name them: allow=('..',); * matches any text")
    back = read(tmp_path / "x", base=BASE, allow=["lm_head.*"])
    assert back.left_out == ("lm_head.extra",)
    same(pairs, back)


@pytest.mark.parametrize("to", ["peft", "kohya", "torchtune", "mlx"])
def test_half_a_pair_is_an_error(tmp_path, to):
    write(llama_pairs(), tmp_path / "x", to, base=BASE)
    spoil(
        tmp_path / "x",
        lambda t: t.pop(
            next(k for k in sorted(t) if "0" in k and ("q_proj" in k) and re.search(r"lora_(B|b|up)", k))
        ),
    )
    with pytest.raises(FormatError, match=r"(lacks B|must have factors A and B, got only A)"):
        read(tmp_path / "x", base=BASE)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"r": 8},
            r"contradicts the tensors: model\.layers\.0\.mlp\.down_proj: rank 4 in the file, 8 in the"
            r" settings",
        ),
        ({"use_dora": True}, "use_dora is True, but 0 of 14 layers have a magnitude"),
        ({"target_modules": ["q_proj"]}, r"k_proj is in the file, but not in target_modules"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights 'pissa' changed the base's weights; the original base is needed: give model=",
        ),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "LILY"}, "peft_type 'LILY' cannot be read: its router averages over all tokens"),
    ],
)
def test_peft_settings_that_say_something_else(tmp_path, changes, text):
    write(llama_pairs(), tmp_path / "x", "peft")
    edit(tmp_path / "x", **changes)
    with pytest.raises(FormatError, match=text):
        read(tmp_path / "x")


def test_a_target_of_peft_without_a_tensor(tmp_path):
    """PEFT trains without such a target, and says nothing (peft PR 3603)."""
    write(llama_pairs(), tmp_path / "x", "peft", base=BASE)
    edit(tmp_path / "x", target_modules=[*ALL, "qproj"])
    with pytest.raises(FormatError, match="target_modules without tensors in the file: qproj"):
        read(tmp_path / "x")
    assert read(tmp_path / "x", allow="qproj").left_out == ("qproj",)


def test_a_mixture_of_lora_and_dora_is_no_adapter_of_peft(tmp_path):
    mixed = Pairs({"a": pair(4, 4), "b": pair(4, 4, dora=True)})
    with pytest.raises(
        FormatError,
        match=r"only some layers have a magnitude \(DoRA\); PEFT supports one method for all layers",
    ):
        write(mixed, tmp_path / "x", "peft")
    assert not (tmp_path / "x").exists()


def test_targets_are_endings_only_where_they_mean_no_other_layer(tmp_path):
    write(llama_pairs(), tmp_path / "x", "peft", base=BASE)
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["target_modules"] == sorted(ALL)
    one = Pairs({"model.layers.0.self_attn.q_proj": pair(32, 32)})
    write(one, tmp_path / "y", "peft", base=BASE)
    assert json.loads((tmp_path / "y" / "adapter_config.json").read_text())["target_modules"] == list(
        one.sites
    )


def test_a_pickled_file_is_read_without_running_it(tmp_path):
    write(llama_pairs(), tmp_path / "x", "peft")
    torch.save(load_file(tmp_path / "x" / "adapter_model.safetensors"), tmp_path / "x" / "adapter_model.bin")
    (tmp_path / "x" / "adapter_model.safetensors").unlink()
    same(llama_pairs(), read(tmp_path / "x"))

    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save(
        {"base_model.model.lora_A.weight": Evil()}, tmp_path / "x" / "adapter_model.bin", pickle_module=pickle
    )
    with pytest.raises(
        FormatError, match="is damaged or not a torch file of plain tensors; only plain tensors are read"
    ):
        read(tmp_path / "x")


def test_a_damaged_file(tmp_path):
    write(llama_pairs(), tmp_path / "x", "kohya")
    file = tmp_path / "x" / "lora.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"is damaged or not a safetensors file"):
        read(file)


def test_a_changed_file_of_ours(tmp_path):
    model = models.llama()
    attach(model, "lora", to=["q_proj"], rank=2)
    models.randomise(model)
    store.save(model, tmp_path / "x")
    spoil(tmp_path / "x", lambda t: t.update({k: v + 1 for k, v in t.items()}))
    with pytest.raises(
        FormatError, match=r"does not match veneer\.json; the file was changed or a save was interrupted"
    ):
        read(tmp_path / "x")

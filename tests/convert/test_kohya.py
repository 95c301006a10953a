"""kohya's format."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pairs import draw, pair, same

from veneer.convert import Base, Pair, Pairs, read, write
from veneer.errors import ConfigError, FormatError


def kohya(path, tensors) -> None:
    save_file(tensors, path)
    return path


def test_kohya_names_need_the_model(tmp_path):
    file = kohya(
        tmp_path / "x.safetensors",
        {"lycoris_a_b.lora_down.weight": draw(2, 4), "lycoris_a_b.lora_up.weight": draw(4, 2)},
    )
    with pytest.raises(
        ConfigError,
        match=r"1 names match no known module: lycoris_a_b; give the base model with model=, or its mod",
    ):
        read(file)
    with pytest.raises(ConfigError, match="lycoris_a_b; the given model has no such modules"):
        read(file, base=Base(names=("a.c",)))
    with pytest.raises(
        ConfigError, match=re.escape("names that match several modules: lycoris_a_b (a.b or a_b)")
    ):
        read(file, base=Base(names=("a.b", "a_b")))
    assert read(file, base=Base(names=("a.b",))).sites["a.b"].scaling == 1.0  # without alpha


def test_kohya_parts(tmp_path):
    names = ("unet.down.to_q", "text_encoder.q_proj", "text_encoder_2.q_proj")
    pairs = Pairs(
        {n: pair(4, 4, scaling=0.5) for n in names}, parts=("unet", "text_encoder", "text_encoder_2")
    )
    write(pairs, tmp_path / "x", "kohya")
    keys = {k.partition(".")[0] for k in load_file(tmp_path / "x" / "lora.safetensors")}
    assert keys == {"lora_unet_down_to_q", "lora_te1_q_proj", "lora_te2_q_proj"}
    back = read(tmp_path / "x", base=Base(names=names))
    same(pairs, back)
    # of models without their part
    alone = read(tmp_path / "x" / "lora.safetensors", base=Base(names=("down.to_q", "q_proj")))
    assert set(alone.sites) == set(names)


def test_kohya_tucker_and_scalar(tmp_path):
    down, mid, up = draw(2, 3, 1, 1), draw(2, 2, 3, 3), draw(5, 2, 1, 1)
    tensors = {
        "lora_down.weight": down,
        "lora_mid.weight": mid,
        "lora_up.weight": up,
        "alpha": torch.tensor(1.0),
        "scalar": torch.tensor(3.0),
    }
    file = kohya(tmp_path / "x.safetensors", {f"lycoris_conv.{k}": t for k, t in tensors.items()})
    p = read(file, base=Base(names=("conv",))).sites["conv"]
    want = torch.zeros(5, 3, 3, 3)
    for o in range(5):
        for s in range(2):
            for r in range(2):
                for i in range(3):
                    want[o, i] += 1.5 * up[o, s, 0, 0] * mid[s, r] * down[r, i, 0, 0]
    torch.testing.assert_close(p.product(), want.flatten(1), rtol=1e-5, atol=1e-5)


def test_kohya_other_methods(tmp_path):
    both = {"lycoris_a.lora_down.weight": draw(2, 4), "lycoris_a.lora_up.weight": draw(6, 2)}
    file = kohya(tmp_path / "x.safetensors", {**both, "lycoris_a.dora_scale": draw(1, 4)})
    with pytest.raises(
        FormatError,
        match=re.escape("a: dora_scale (1, 4) scales input columns (wd_on_output=False), which is not DoRA"),
    ):
        read(file, base=Base(names=("a",)))
    file = kohya(tmp_path / "y.safetensors", {**both, "lycoris_b.hada_w1_a": draw(2, 4)})
    with pytest.raises(FormatError, match=r"of LoHa \(LyCORIS\), .*veneer.extract: lycoris_b\.hada_w1_a"):
        read(file, base=Base(names=("a", "b")))


def test_kohya_cannot_hold(tmp_path):
    with pytest.raises(
        FormatError, match=r"kohya's format supports linear and conv layers only, got e \(embedding\)"
    ):
        write(Pairs({"e": Pair(draw(2, 9), draw(4, 2), 1.0, kind="embedding")}), tmp_path / "x", "kohya")
    with pytest.raises(
        FormatError, match="a_b and another layer are both named lycoris_a_b in kohya's format"
    ):
        write(Pairs({"a.b": pair(4, 4), "a_b": pair(4, 4)}), tmp_path / "x", "kohya")
    with pytest.raises(ConfigError, match="unknown part 'vae' of kohya's format"):
        write(Pairs({"vae.b": pair(4, 4)}, parts=("vae",)), tmp_path / "x", "kohya")

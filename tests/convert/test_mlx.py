"""mlx-lm's format."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from support.pairs import BASE, draw, edit, llama_pairs, pair, spoil

from veneer.convert import Pairs, read, write
from veneer.errors import FormatError


def test_mlx_layout(tmp_path):
    pairs = Pairs(
        {f"model.layers.1.{n}": pair(32, 32, scaling=20.0) for n in ("self_attn.q_proj", "self_attn.o_proj")},
        dropout=0.1,
        origin="x",
    )
    write(pairs, tmp_path / "x", "mlx", base=BASE)
    file = load_file(tmp_path / "x" / "adapters.safetensors")
    assert file["model.layers.1.self_attn.q_proj.lora_a"].shape == (32, 4) and file[
        "model.layers.1.self_attn.q_proj.lora_b"
    ].shape == (4, 32)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    lora = {"rank": 4, "scale": 20.0, "dropout": 0.1, "keys": ["self_attn.o_proj", "self_attn.q_proj"]}
    assert config == {"model": "x", "fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora}
    write(pairs, tmp_path / "y", "mlx")
    assert json.loads((tmp_path / "y" / "adapter_config.json").read_text())["num_layers"] == -1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"fine_tune_type": "full"},
            "fine_tune_type must be 'lora' or 'dora', got 'full'; other types are not adapters",
        ),
        (
            {"lora_parameters": {"rank": 4, "alpha": 8}},
            r"lacks lora_parameters\.scale, which the change depends on; add it",
        ),
        ({"lora_parameters": {"rank": 8, "scale": 1.0}}, "rank 4 in the file, 8 in the settings"),
        ({"fine_tune_type": "dora"}, "has no magnitude, but fine_tune_type is dora"),
    ],
)
def test_mlx_settings_that_say_something_else(tmp_path, changes, text):
    write(llama_pairs(), tmp_path / "x", "mlx")
    edit(tmp_path / "x", **changes)
    with pytest.raises(FormatError, match=text):
        read(tmp_path / "x")


def test_mlx_cannot_hold(tmp_path):
    with pytest.raises(
        FormatError,
        match=r"mlx-lm names the modules of this model differently: transformer\.h\.0\.attn\.c_attn",
    ):
        write(Pairs({"transformer.h.0.attn.c_attn": pair(4, 4)}), tmp_path / "x", "mlx")
    with pytest.raises(FormatError, match="mlx-lm supports one method for all layers"):
        write(
            Pairs({"lm_head": pair(4, 4), "model.layers.0.x": pair(4, 4, dora=True)}), tmp_path / "x", "mlx"
        )
    write(llama_pairs(), tmp_path / "x", "mlx")
    spoil(
        tmp_path / "x",
        lambda t: t.update(
            {"model.layers.0.mlp.e.lora_a": draw(2, 4, 4), "model.layers.0.mlp.e.lora_b": draw(2, 4, 4)}
        ),
    )
    with pytest.raises(
        FormatError, match=r"adapters of stacked experts are not supported: model\.layers\.0\.mlp\.e"
    ):
        read(tmp_path / "x")

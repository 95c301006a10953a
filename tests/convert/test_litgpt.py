"""LitGPT's format."""

from __future__ import annotations

import pytest
import torch
from support.pairs import BASE, draw, pair, same

from veneer.convert import Base, Pairs, read, write
from veneer.errors import ConfigError, FormatError


def litgpt_folder(folder, tensors, **changes) -> None:
    import yaml

    folder.mkdir()
    torch.save(tensors, folder / "lit_model.pth.lora")
    switches = dict(
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=False,
        lora_mlp=False,
        lora_head=False,
    )
    (folder / "hyperparameters.yaml").write_text(
        yaml.safe_dump({"lora_r": 2, "lora_alpha": 3, "lora_dropout": 0.0, **switches, **changes})
    )


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_litgpts_fused_layer_in_groups(tmp_path, kv):
    """Until 0.5.3: B's thirds take A's thirds; the fused output is then split by groups of heads."""
    heads, head, width, r = 4, 4, 12, 2
    rows = [heads * head, kv * head, kv * head]
    A, B, x = draw(3 * r, width), draw(sum(rows), r), draw(5, width)
    litgpt_folder(
        tmp_path / "x",
        {"model": {"transformer.h.0.attn.attn.lora_A": A, "transformer.h.0.attn.attn.lora_B": B}},
    )
    # (5, rows)
    fused = torch.cat([x @ a.mT @ b.mT for a, b in zip(A.chunk(3), B.split(rows), strict=True)], 1) * 1.5
    grouped = fused.view(5, kv, heads // kv + 2, head)
    want = {"q": grouped[:, :, :-2], "k": grouped[:, :, -2], "v": grouped[:, :, -1]}
    pairs = read(tmp_path / "x", base=Base(heads=heads, kv_heads=kv, head=head))
    for which, y in want.items():
        got = x @ pairs.sites[f"model.layers.0.self_attn.{which}_proj"].product().mT
        torch.testing.assert_close(got, y.reshape(5, -1), rtol=1e-5, atol=1e-5)


def test_litgpt_fills_what_is_missing(tmp_path):
    import yaml

    pairs = Pairs(
        {"model.layers.1.self_attn.q_proj": pair(32, 32), "model.layers.1.mlp.up_proj": pair(48, 32)},
        origin="o/m",
    )
    notes = write(pairs, tmp_path / "x", "litgpt", base=BASE)
    assert notes[0] == "6 layers without a change were filled with zeros: LitGPT adapts every layer of a kind"
    tensors = torch.load(tmp_path / "x" / "lit_model.pth.lora", weights_only=True)["model"]
    assert set(tensors) == {
        f"transformer.h.{i}.{m}.lora_{f}"
        for i in (0, 1)
        for m in ("attn.qkv", "mlp.fc_1", "mlp.fc_2", "mlp.proj")
        for f in "AB"
    }
    said = yaml.safe_load((tmp_path / "x" / "hyperparameters.yaml").read_text())
    assert {k: v for k, v in said.items() if v is True} == {"lora_query": True, "lora_mlp": True} and said[
        "lora_alpha"
    ] == 8
    back = read(tmp_path / "x", base=BASE)
    same(pairs, back)
    assert len(back.left_out) == 6


def test_litgpt_complaints(tmp_path):
    plain = {"transformer.h.0.attn.qkv.lora_A": draw(6, 32), "transformer.h.0.attn.qkv.lora_B": draw(64, 2)}
    litgpt_folder(tmp_path / "a", plain)
    with pytest.raises(
        ConfigError,
        match="LitGPT fuses q, k and v into one layer; heads, kv_heads, head of the base model must be known",
    ):
        read(tmp_path / "a")
    with pytest.raises(
        FormatError,
        match=(
            r"must be \(6, \.\.\) and \(96, 2\) for query and key and value at rank 2, got \(6, 32\) and"
            r" \(64, 2\)"
        ),
    ):
        read(tmp_path / "a", base=Base(heads=8, kv_heads=2, head=8))
    (tmp_path / "a" / "hyperparameters.yaml").write_text("lora_r: 2")
    with pytest.raises(FormatError, match=r"hyperparameters\.yaml lacks lora_alpha"):
        read(tmp_path / "a", base=BASE)
    (tmp_path / "a" / "hyperparameters.yaml").unlink()
    with pytest.raises(
        FormatError, match=r"hyperparameters\.yaml is missing, but the adapter's scaling depends on it"
    ):
        read(tmp_path / "a", base=BASE)
    litgpt_folder(
        tmp_path / "b",
        {"transformer.h.0.mlp.fc.lora_A": draw(2, 4), "transformer.h.0.mlp.fc.lora_B": draw(4, 2)},
    )
    with pytest.raises(
        FormatError, match=r"only Llama-like models are supported, got layers transformer\.h\.0\.mlp\.fc"
    ):
        read(tmp_path / "b")
    (tmp_path / "b" / "model_config.yaml").write_text("name: pythia\nmlp_class_name: GptNeoxMLP")
    with pytest.raises(
        FormatError, match=r"model_config\.yaml: only Llama-like models are supported, got pythia"
    ):
        read(tmp_path / "b")
    with pytest.raises(FormatError, match=r"LitGPT does not adapt transformer\.h\.0\.x"):
        write(Pairs({"transformer.h.0.x": pair(4, 4)}), tmp_path / "c", "litgpt", base=BASE)
    with pytest.raises(
        FormatError,
        match=(
            r"the adapter must fit the base, got model\.layers\.0\.self_attn\.q_proj \(4 x 4, in the base 32"
            r" x 32\)"
        ),
    ):
        write(Pairs({"model.layers.0.self_attn.q_proj": pair(4, 4)}), tmp_path / "c", "litgpt", base=BASE)

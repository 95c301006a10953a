"""The plain LoRA that vLLM accepts."""

from __future__ import annotations

import json
import re

import pytest
from safetensors.torch import load_file
from support.pairs import draw, edit, pair

from veneer.convert import Pair, Pairs, read, write
from veneer.errors import FormatError


def vllm_says(folder, max_rank: int) -> list[str]:
    """Returns the objections of vLLM 0.33's documented checks: settings, names of tensors, ranks."""
    c = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    wrong = [f"no {k}" for k in ("r", "lora_alpha", "target_modules") if k not in c]
    wrong += [f"max rank {max_rank}"] * (max_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512))
    ranks = {"r": c["r"], **(c.get("rank_pattern") or {})}
    wrong += [f"{k}: rank {r}" for k, r in ranks.items() if not isinstance(r, int) or not 0 < r <= max_rank]
    refused = (
        "modules_to_save",
        "use_dora",
        "lora_bias",
        "alora_invocation_tokens",
        "layer_replication",
        "use_bdlora",
        "use_qalora",
    )
    wrong += [k for k in refused if c.get(k)]
    wrong += [f"bias {c['bias']}"] * (c.get("bias", "none") != "none")
    start = c.get("init_lora_weights", True)
    wrong += [f"start {start}"] * (
        isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    )
    for name, t in tensors.items():
        if not re.fullmatch(
            r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)",
            name,
        ):
            wrong.append(f"name {name}")
            continue
        wrong += [f"rank of {name}"] * (t.shape[0 if name.endswith(("A", "A.weight")) else 1] != c["r"])
    return wrong


@pytest.mark.parametrize(
    ("rank", "legal"), [(1, 1), (2, 8), (8, 8), (9, 16), (20, 32), (65, 128), (257, 320), (321, 512)]
)
def test_vllm_gets_only_what_it_accepts(tmp_path, rank, legal):
    sites = {
        "model.layers.0.self_attn.q_proj": pair(8, 600, rank, 1.4),
        "model.embed_tokens": Pair(draw(rank, 9), draw(8, rank), 3.0, kind="embedding"),
    }
    notes = write(Pairs(sites, dropout=0.1, task="CAUSAL_LM"), tmp_path / "x", "vllm")
    assert vllm_says(tmp_path / "x", legal) == []
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (
        config["r"] == config["lora_alpha"] == legal
        and config["rank_pattern"] == config["alpha_pattern"] == {}
    )
    assert (
        config["init_lora_weights"] is True and not config.get("use_rslora") and config["lora_dropout"] == 0
    )
    assert notes[-1] == f"serve it with --enable-lora --max-lora-rank {legal}"
    for n, p in read(tmp_path / "x").sites.items():
        assert (
            p.scaling == 1.0 and (p.product() - sites[n].product()).norm() < 1e-6 * sites[n].product().norm()
        )


def test_the_checker_of_vllm_can_say_no(tmp_path):
    write(Pairs({"a": pair(32, 32, 3, dora=True)}), tmp_path / "x", "peft")
    assert vllm_says(tmp_path / "x", 8) == ["use_dora", "name base_model.model.a.lora_magnitude_vector"]
    write(Pairs({"a": pair(32, 32, 9), "b": pair(32, 32, 3)}), tmp_path / "y", "peft")
    edit(tmp_path / "y", bias="all", init_lora_weights="pissa")
    ranks = ["rank of base_model.model.b.lora_A.weight", "rank of base_model.model.b.lora_B.weight"]
    assert vllm_says(tmp_path / "y", 8) == ["r: rank 9", "bias all", "start pissa", *ranks]


def test_vllm_cannot_hold(tmp_path):
    """vllm 10849: DoRA is refused here, with what would do, and not by the server."""
    with pytest.raises(
        FormatError,
        match=(
            r"vLLM cannot hold DoRA's magnitudes; give model= and rank= to convert the adapter to plain LoRA"
        ),
    ):
        write(Pairs({"a": pair(4, 4, dora=True)}), tmp_path / "x", "vllm")
    with pytest.raises(FormatError, match=r"vLLM supports linear and embedding layers only, got c \(conv\)"):
        write(Pairs({"c": Pair(draw(2, 3, 3, 3), draw(4, 2), 1.0, kind="conv")}), tmp_path / "x", "vllm")
    with pytest.raises(
        FormatError, match="rank 513 > 512, the largest that vLLM serves; truncate it with rank=512"
    ):
        write(Pairs({"a": pair(4, 4, 513)}), tmp_path / "x", "vllm")
    assert not (tmp_path / "x").exists()

"""Adapters between dialects: round trips and the effect on a model's logits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support import models
from support.pairs import ALL, BASE, CLOSE, llama_pairs, pair, same

from veneer.adapt.attach import attach, detach
from veneer.adapt.store import store
from veneer.convert import READERS, WRITERS, Base, Pairs, detect, read, write
from veneer.convert.base import of_config, of_model
from veneer.convert.pairs import take_part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("to", "dora"),
    [(to, dora) for to in sorted(READERS) for dora in (False, True) if (to, dora) != ("litgpt", True)],
)
def test_a_round_trip_is_bit_equal(tmp_path, to, dora, dtype):
    pairs = llama_pairs(dora=dora, dtype=dtype, scaling=1.7)
    if to == "diffusers":
        pairs = take_part(pairs, "transformer")
    notes = write(pairs, tmp_path / "there", to, base=BASE)
    assert detect(tmp_path / "there").dialect == to
    same(pairs, read(tmp_path / "there", base=BASE))
    assert not any("round" in n or "padded" in n for n in notes)


@pytest.mark.parametrize("to", [*sorted(READERS), "vllm"])
def test_mixed_ranks_and_scalings_keep_the_change(tmp_path, to):
    """peft 2733, vllm 6909, diffusers 14409: the scaling lost on the way."""
    sites = {
        n: pair(*p.product().shape, rank=2 + i % 3, scaling=0.3 * (1 + i))
        for i, (n, p) in enumerate(llama_pairs().sites.items())
    }
    pairs = Pairs(sites)
    if to == "diffusers":
        pairs = take_part(pairs, "unet")
    notes = write(pairs, tmp_path / "there", to, base=BASE)
    back = read(tmp_path / "there", base=BASE)
    for n, p in pairs.sites.items():
        error = (p.product() - back.sites[n].product()).norm() / p.product().norm()
        assert error < (1e-6 if to not in ("peft", "kohya") else 3e-7), n
    assert any("folded into B at 14 layers" in n for n in notes) == (to not in ("peft", "kohya"))


@pytest.mark.parametrize(
    ("to", "method"),
    [
        *((to, "lora") for to in WRITERS if to != "gguf"),
        *((to, "dora") for to in WRITERS if to not in ("litgpt", "vllm", "gguf")),
    ],
)
def test_the_effect_on_the_logits_is_the_same(tmp_path, to, method):
    """peft 1329, 1065, 2608; mlx-lm 1119; litgpt 1990: converted adapters that do not work elsewhere."""
    model = models.llama()
    attach(
        model,
        method,
        to=ALL,
        rank=4,
        alpha=8,
        stabilised=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\.mlp\..*": 3},
    )
    models.randomise(model)
    want = models.output(model)
    store.save(model, tmp_path / "start")
    detach(model)
    pairs = read(tmp_path / "start")
    if to == "diffusers":
        pairs = take_part(pairs, "transformer")
    write(pairs, tmp_path / "there", to, base=BASE)
    write(read(tmp_path / "there", base=BASE), tmp_path / "back", "peft", base=BASE)
    store.load(model, tmp_path / "back")
    torch.testing.assert_close(models.output(model), want, **CLOSE)


def test_embeddings_and_conv1d_by_way_of_peft(tmp_path):
    model = models.gpt2()
    attach(model, "lora", to=["wte", "c_attn", "c_proj"], rank=2, alpha=2)
    models.randomise(model)
    want = models.output(model)
    store.save(model, tmp_path / "start")
    detach(model)
    pairs = read(tmp_path / "start")
    assert pairs.sites["transformer.wte"].kind == "embedding" and pairs.transposed and pairs.parts == ()
    write(pairs, tmp_path / "back", "peft")
    store.load(model, tmp_path / "back")
    torch.testing.assert_close(models.output(model), want, rtol=0, atol=0)


def test_convolutions_through_kohya(tmp_path):
    model = models.conv_net()
    attach(model, "dora", to=["first", "second", "line", "head"], rank=2, alpha=3)
    models.randomise(model)
    want = models.output(model)
    store.save(model, tmp_path / "start", probe=models.inputs(model))
    detach(model)
    write(read(tmp_path / "start"), tmp_path / "kohya", "kohya")
    file = load_file(tmp_path / "kohya" / "lora.safetensors")
    assert file["lycoris_first.lora_up.weight"].shape == (8, 2, 1, 1) and file[
        "lycoris_first.dora_scale"
    ].shape == (8, 1, 1, 1)
    write(read(tmp_path / "kohya", base=of_model(model)), tmp_path / "back", "peft")
    store.load(model, tmp_path / "back")
    torch.testing.assert_close(models.output(model), want, rtol=0, atol=0)


def test_sizes_of_a_base():
    assert (BASE.heads, BASE.kv_heads, BASE.head, BASE.width, BASE.layers, BASE.kind) == (
        4,
        2,
        8,
        32,
        2,
        "llama",
    )
    assert (
        BASE.embeddings == ("model.embed_tokens",)
        and not BASE.transposed
        and of_model(models.gpt2()).transposed
    )
    assert of_config({"text_config": {"num_attention_heads": 6, "hidden_size": 24}}).head == 4
    assert of_config({"num_attention_heads": 6, "hidden_size": 24, "head_dim": 8}).head == 8
    assert Base(heads=3).also(Base(heads=4, layers=2)) == Base(heads=3, layers=2)

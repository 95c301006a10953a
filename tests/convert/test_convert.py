"""Adapters between dialects: round trips, the effect on a model's logits, and every complaint."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import models

from veneer.adapt.attach import attach, detach
from veneer.adapt.store import store
from veneer.convert import READERS, WRITERS, Base, Pair, Pairs, detect, read, write
from veneer.convert.base import of_config, of_model
from veneer.convert.pairs import cut, folded, padded, take_part, to_dtype, uniform
from veneer.convert.tensor_files import metadata
from veneer.errors import ConfigError, FormatError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE = of_model(models.llama())
SIZES = {
    "q": (32, 32),
    "k": (16, 32),
    "v": (16, 32),
    "o": (32, 32),
    "gate": (48, 32),
    "up": (48, 32),
    "down": (32, 48),
}
CLOSE = dict(rtol=0, atol=2e-5)  # logits of size 4 through two layers in float32


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def pair(
    out: int,
    in_: int,
    rank: int = 4,
    scaling: float = 2.0,
    *,
    seed: int = 0,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    m = draw(out, seed=seed + 2).abs().to(dtype) if dora else None
    return Pair(
        draw(rank, in_, seed=seed, dtype=dtype), draw(out, rank, seed=seed + 1, dtype=dtype), scaling, m
    )


def llama_pairs(**options) -> Pairs:
    """Pairs for every projection of the tiny Llama."""
    names = [
        (f"model.layers.{i}.{'mlp' if n in ('gate', 'up', 'down') else 'self_attn'}.{n}_proj", n, i)
        for i in (0, 1)
        for n in SIZES
    ]
    return Pairs({name: pair(*SIZES[n], seed=10 * i, **options) for name, n, i in names}, origin="owner/tiny")


def same(a: Pairs, b: Pairs) -> None:
    """Equal bit for bit, scalings up to the last digit of a double."""
    assert set(a.sites) == set(b.sites)
    for n, p in a.sites.items():
        q = b.sites[n]
        assert torch.equal(p.A, q.A) and torch.equal(p.B, q.B), n
        assert p.A.dtype == q.A.dtype and p.kind == q.kind
        assert p.scaling == pytest.approx(q.scaling, rel=1e-7)  # kohya keeps alpha in float32
        assert (p.magnitude is None) == (q.magnitude is None) and (
            p.magnitude is None or torch.equal(p.magnitude, q.magnitude)
        )


# --- round trips ----------------------------------------------------------------------------------------------------


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
    [*((to, "lora") for to in WRITERS), *((to, "dora") for to in WRITERS if to not in ("litgpt", "vllm"))],
)
def test_the_effect_on_the_logits_is_the_same(tmp_path, to, method):
    """peft 1329, 1065, 2608; mlx-lm 1119; litgpt 1990: adapters that another program cannot use after conversion."""
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


# --- the middle form ------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.floats(0.01, 100), st.integers(0, 9))
def test_padding_and_folding_keep_the_product(rank, more, scaling, seed):
    pairs = Pairs({"x": pair(7, 6, rank, scaling, seed=seed)})
    want = pairs.sites["x"].product().double()
    for other in (padded(pairs, rank + more), folded(pairs).pairs, uniform(pairs).pairs):
        assert (other.sites["x"].product() - want).norm() <= 1e-6 * want.norm()
    assert torch.equal(padded(pairs, rank + more).sites["x"].product(), pairs.sites["x"].product())
    wide = padded(pairs, rank + more).sites["x"]
    assert not wide.A[rank:].any() and not wide.B[:, rank:].any()


def test_folding_says_how_much_was_rounded():
    exact = folded(Pairs({"x": pair(4, 4, scaling=0.25)}))
    assert exact.notes == [] and exact.pairs.sites["x"].scaling == 1.0
    rounded = folded(Pairs({"x": pair(64, 64, scaling=0.3, dtype=torch.bfloat16)}))
    (note,) = rounded.notes
    said = float(
        re.fullmatch(
            r"the scaling was folded into B at 1 layers; rounding moved no B by more than (.*) of itself",
            note,
        )[1]
    )
    assert 1e-4 < said < 2**-8


def test_cutting_is_the_best_approximation():
    pairs = Pairs({"x": pair(9, 8, 5, 1.5)})
    ready, (note,) = cut(pairs, rank=2)
    U, S, Vh = torch.linalg.svd(pairs.sites["x"].product().double())
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    assert (ready.sites["x"].product() - best).norm() < 1e-5 * best.norm()
    lost = float(S[2:].norm() / S.norm())
    assert note == f"cut to ranks of at most 2; of no layer's change more than {lost:.2%} was lost"
    with pytest.raises(FormatError, match="DoRA's change has no low rank without the base's weights: x"):
        cut(Pairs({"x": pair(4, 4, dora=True)}), rank=1)


def test_another_dtype_is_said():
    ready, notes = to_dtype(Pairs({"x": pair(4, 4, dora=True)}), torch.float16)
    assert notes == ["factors were converted from float32 to float16"]
    assert ready.sites["x"].A.dtype == torch.float16 and ready.sites["x"].magnitude.dtype == torch.float32
    assert to_dtype(ready, torch.float16).notes == []


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(
        FormatError,
        match=re.escape(
            "factors that do not fit together, A must be (r, in..) and B (out, r): x: A (3, 4), B (5, 2)"
        ),
    ):
        Pairs({"x": Pair(draw(3, 4), draw(5, 2), 1.0)})
    with pytest.raises(FormatError, match="there is no pair of factors A and B in this adapter"):
        Pairs({})


def test_parts_of_a_pipeline():
    both = Pairs({"unet.a": pair(4, 4), "text_encoder.b": pair(4, 4)}, parts=("unet", "text_encoder"))
    one = take_part(both, "unet")
    assert list(one.sites) == ["unet.a"] and one.left_out == ("text_encoder.b",)
    with pytest.raises(ConfigError, match="the adapter has no part 'unt'; did you mean 'unet'"):
        take_part(both, "unt")
    with pytest.raises(FormatError, match="modules that belong to none of the parts unet: b"):
        Pairs({"b": pair(4, 4)}, parts=("unet",))


def test_one_model_only(tmp_path):
    both = Pairs({"unet.a": pair(4, 4), "text_encoder.b": pair(4, 4)}, parts=("unet", "text_encoder"))
    with pytest.raises(
        ConfigError,
        match="the adapter changes unet and text_encoder, and this dialect holds one model; choose one with part=",
    ):
        write(both, tmp_path / "x", "peft")
    assert not (tmp_path / "x").exists()


def test_writing_needs_an_empty_folder_and_a_known_dialect(tmp_path):
    write(llama_pairs(), tmp_path / "x", "peft")
    with pytest.raises(ConfigError, match="x holds something already; choose another folder or empty it"):
        write(llama_pairs(), tmp_path / "x", "kohya")
    with pytest.raises(ConfigError, match="unknown dialect 'kohja'; did you mean 'kohya'"):
        write(llama_pairs(), tmp_path / "y", "kohja")


def test_layers_that_the_base_does_not_have(tmp_path):
    write(Pairs({"model.layers.7.self_attn.q_proj": pair(32, 32)}), tmp_path / "x", "peft")
    with pytest.raises(
        FormatError,
        match=r"1 of 1 layers are not in the base model: model\.layers\.7\.self_attn\.q_proj; it has e\.g\.",
    ):
        read(tmp_path / "x", base=BASE)


# --- which dialect --------------------------------------------------------------------------------------------------


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
        match=r"is of the adapters library, which has names of its own; merge it there, keep the merged model",
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
    with pytest.raises(FormatError, match="there is nothing at"):
        detect(tmp_path / "nothing")
    save_file({"model.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        FormatError,
        match=r"no adapter of a dialect known here: no tensor in model\.safetensors is called like one's",
    ):
        detect(tmp_path)


def test_several_adapters_in_a_folder(tmp_path):
    for name in ("a", "b"):
        write(llama_pairs(), tmp_path / name, "kohya")
        (tmp_path / name / "lora.safetensors").rename(tmp_path / f"{name}.safetensors")
        (tmp_path / name).rmdir()
    with pytest.raises(
        FormatError, match=r"holds several adapters; name the file of one: a\.safetensors, b\.safetensors"
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
        FormatError, match=r"is PEFT's, but the tensors in adapters\.safetensors are called like those of mlx"
    ):
        detect(tmp_path / "x")


# --- what is not understood -----------------------------------------------------------------------------------------


def spoil(folder, change) -> None:
    """Changes the tensors of the one safetensors file in a folder."""
    (file,) = folder.glob("*.safetensors")
    tensors, header = load_file(file), metadata(file)
    change(tensors)
    save_file(tensors, file, header)


@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "torchtune", "mlx"])
def test_unknown_tensors_are_an_error_unless_allowed(tmp_path, to):
    """diffusers 14005, 14088, 13998: keys dropped without a word."""
    pairs = take_part(llama_pairs(), "unet") if to == "diffusers" else llama_pairs()
    write(pairs, tmp_path / "x", to, base=BASE)
    spoil(tmp_path / "x", lambda t: t.update({"lm_head.extra": torch.zeros(2)}))
    with pytest.raises(FormatError) as e:
        read(tmp_path / "x", base=BASE)
    assert "holds what cannot be carried:\n- tensors" in str(e.value) and "lm_head.extra" in str(e.value)
    assert str(e.value).endswith("to leave something out, name it: allow=('..',), with * for any text")
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
    with pytest.raises(FormatError, match=r"(lacks B|has only A of its factors)"):
        read(tmp_path / "x", base=BASE)


def edit(folder, **changes) -> None:
    """Changes adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 8}, r"do not agree: model\.layers\.0\.mlp\.down_proj: rank 4 in the file, 8 in the settings"),
        ({"use_dora": True}, "use_dora is True, but 0 of 14 layers have a magnitude"),
        ({"target_modules": ["q_proj"]}, r"k_proj is in the file, but no target of the settings"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights 'pissa' moved the base, which must be loaded to say what the adapter changes",
        ),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not read here"),
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
    with pytest.raises(FormatError, match="targets in the settings without a tensor in the file: qproj"):
        read(tmp_path / "x")
    assert read(tmp_path / "x", allow="qproj").left_out == ("qproj",)


def test_a_mixture_of_lora_and_dora_is_no_adapter_of_peft(tmp_path):
    mixed = Pairs({"a": pair(4, 4), "b": pair(4, 4, dora=True)})
    with pytest.raises(
        FormatError,
        match=r"some layers have a magnitude \(DoRA\) and others have none; PEFT has one method for all",
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
        FormatError, match="is no whole torch file of plain tensors, and nothing else is read"
    ):
        read(tmp_path / "x")


def test_a_damaged_file(tmp_path):
    write(llama_pairs(), tmp_path / "x", "kohya")
    file = tmp_path / "x" / "lora.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"is not a whole safetensors file"):
        read(file)


def test_a_changed_file_of_ours(tmp_path):
    model = models.llama()
    attach(model, "lora", to=["q_proj"], rank=2)
    models.randomise(model)
    store.save(model, tmp_path / "x")
    spoil(tmp_path / "x", lambda t: t.update({k: v + 1 for k, v in t.items()}))
    with pytest.raises(
        FormatError,
        match=r"is not the file that veneer\.json was written with; it was changed, or a save was cut off",
    ):
        read(tmp_path / "x")


# --- kohya ----------------------------------------------------------------------------------------------------------


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
        match=r"1 modules cannot be told from their names: lycoris_a_b; give the base model with model=, or its mod",
    ):
        read(file)
    with pytest.raises(ConfigError, match="lycoris_a_b; the model that was given has none such"):
        read(file, base=Base(names=("a.c",)))
    with pytest.raises(
        ConfigError, match=re.escape("more than one module could be meant: lycoris_a_b (a.b or a_b)")
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
    alone = read(
        tmp_path / "x" / "lora.safetensors", base=Base(names=("down.to_q", "q_proj"))
    )  # of models without their part
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
    with pytest.raises(
        FormatError, match=r"tensors of another kind than factors of plain LoRA: lycoris_b\.hada_w1_a"
    ):
        read(file, base=Base(names=("a", "b")))


def test_kohya_cannot_hold(tmp_path):
    with pytest.raises(
        FormatError, match=r"kohya's format holds changes of linear and conv layers only, not e \(embedding\)"
    ):
        write(Pairs({"e": Pair(draw(2, 9), draw(4, 2), 1.0, kind="embedding")}), tmp_path / "x", "kohya")
    with pytest.raises(
        FormatError, match="a_b and another layer are both called lycoris_a_b in kohya's format"
    ):
        write(Pairs({"a.b": pair(4, 4), "a_b": pair(4, 4)}), tmp_path / "x", "kohya")
    with pytest.raises(ConfigError, match="kohya's format has no part 'vae'"):
        write(Pairs({"vae.b": pair(4, 4)}, parts=("vae",)), tmp_path / "x", "kohya")


# --- diffusers ------------------------------------------------------------------------------------------------------


def test_diffusers_of_any_age(tmp_path):
    """Names of before 0.17, of before PEFT, and today's; alpha from a tensor, from the header, or the rank."""
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
        match=r"in diffusers' files names begin with a part of the pipeline; say which one this adapter changes: part='unet'",
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


# --- torchtune ------------------------------------------------------------------------------------------------------


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
        match="torchtune orders the rows of q and k by attention heads, and the base model's kind, heads, kv_heads, head are",
    ):
        read(tmp_path / "x")
    with pytest.raises(
        FormatError,
        match="q_proj has 32 rows, but the base model's 8 heads of 8 ask for 64; is it another base",
    ):
        read(tmp_path / "x", base=Base(heads=8, kv_heads=2, head=8, kind="llama"))
    with pytest.raises(
        FormatError,
        match="whether torchtune turns the rows of q and k of bloom models is not known here; known: llama, ",
    ):
        read(tmp_path / "x", base=Base(heads=4, kv_heads=2, head=8, kind="bloom"))
    models.llama().config.to_json_file(
        tmp_path / "x" / "config.json"
    )  # which torchtune puts beside its adapters
    same(llama_pairs(), read(tmp_path / "x"))


def export(pairs: Pairs, folder) -> None:
    """What torchtune's checkpointer leaves for PEFT: its names, three settings."""
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
        match=r"torchtune's export turns the rows of q and k of qwen2 models, which never were; read the folder with adapter_mo",
    ):
        read(tmp_path / "x", base=Base(kind="qwen2"))
    export(llama_pairs(dora=True), tmp_path / "y")
    with pytest.raises(
        FormatError, match="torchtune's export has the magnitudes of q and k in another order than the rows"
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
    with pytest.raises(FormatError, match=r"torchtune's module 'layers\.0\.attn\.z' is not known here"):
        read(tmp_path, base=BASE)


# --- mlx-lm ---------------------------------------------------------------------------------------------------------


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
            "was fine-tuned with fine_tune_type 'full'; only lora and dora are adapters",
        ),
        (
            {"lora_parameters": {"rank": 4, "alpha": 8}},
            r"lacks lora_parameters\.scale, without which the change is not known",
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
        match=r"mlx-lm has other names for the modules of this model: transformer\.h\.0\.attn\.c_attn",
    ):
        write(Pairs({"transformer.h.0.attn.c_attn": pair(4, 4)}), tmp_path / "x", "mlx")
    with pytest.raises(FormatError, match="mlx-lm has one method for all"):
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
        FormatError, match=r"changes of stacked experts are no pairs of matrices: model\.layers\.0\.mlp\.e"
    ):
        read(tmp_path / "x")


# --- LitGPT ---------------------------------------------------------------------------------------------------------


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
    """Until 0.5.3: B's thirds take A's thirds, and the fused output is then split head group by head group."""
    heads, head, width, r = 4, 4, 12, 2
    rows = [heads * head, kv * head, kv * head]
    A, B, x = draw(3 * r, width), draw(sum(rows), r), draw(5, width)
    litgpt_folder(
        tmp_path / "x",
        {"model": {"transformer.h.0.attn.attn.lora_A": A, "transformer.h.0.attn.attn.lora_B": B}},
    )
    fused = (
        torch.cat([x @ a.mT @ b.mT for a, b in zip(A.chunk(3), B.split(rows), strict=True)], 1) * 1.5
    )  # (5, rows)
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
    assert notes[0] == "6 layers without a change were filled with zeros: LitGPT adapts all layers of a kind"
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
        match="LitGPT holds q, k and v in one layer, and the base model's heads, kv_heads, head are not known",
    ):
        read(tmp_path / "a")
    with pytest.raises(
        FormatError,
        match=r"lora_A is \(6, 32\) and lora_B \(64, 2\), but query and key and value at rank 2 ask for",
    ):
        read(tmp_path / "a", base=Base(heads=8, kv_heads=2, head=8))
    (tmp_path / "a" / "hyperparameters.yaml").write_text("lora_r: 2")
    with pytest.raises(FormatError, match=r"hyperparameters\.yaml lacks lora_alpha"):
        read(tmp_path / "a", base=BASE)
    (tmp_path / "a" / "hyperparameters.yaml").unlink()
    with pytest.raises(
        FormatError,
        match=r"there is no .*hyperparameters\.yaml, without which the adapter's scaling is not known",
    ):
        read(tmp_path / "a", base=BASE)
    litgpt_folder(
        tmp_path / "b",
        {"transformer.h.0.mlp.fc.lora_A": draw(2, 4), "transformer.h.0.mlp.fc.lora_B": draw(4, 2)},
    )
    with pytest.raises(
        FormatError, match=r"is of a model that is not of Llama's kind: transformer\.h\.0\.mlp\.fc"
    ):
        read(tmp_path / "b")
    (tmp_path / "b" / "model_config.yaml").write_text("name: pythia\nmlp_class_name: GptNeoxMLP")
    with pytest.raises(
        FormatError,
        match=r"model_config\.yaml: pythia is not of Llama's kind, whose layers alone are known here",
    ):
        read(tmp_path / "b")
    with pytest.raises(FormatError, match=r"LitGPT does not adapt transformer\.h\.0\.x"):
        write(Pairs({"transformer.h.0.x": pair(4, 4)}), tmp_path / "c", "litgpt", base=BASE)
    with pytest.raises(
        FormatError,
        match=r"the adapter is not one of this base: model\.layers\.0\.self_attn\.q_proj is 4 x 4, in the base 32 x 32",
    ):
        write(Pairs({"model.layers.0.self_attn.q_proj": pair(4, 4)}), tmp_path / "c", "litgpt", base=BASE)


# --- vLLM -----------------------------------------------------------------------------------------------------------


def vllm_says(folder, max_rank: int) -> list[str]:
    """What vLLM 0.33's documented checks say against a folder: settings, names of tensors, ranks."""
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
        match=r"vLLM has no magnitudes \(DoRA\); the adapter must become plain LoRA, which needs the base model",
    ):
        write(Pairs({"a": pair(4, 4, dora=True)}), tmp_path / "x", "vllm")
    with pytest.raises(
        FormatError, match=r"vLLM holds changes of linear and embedding layers only, not c \(conv\)"
    ):
        write(Pairs({"c": Pair(draw(2, 3, 3, 3), draw(4, 2), 1.0, kind="conv")}), tmp_path / "x", "vllm")
    with pytest.raises(
        FormatError, match="rank 513 > 512, the largest that vLLM serves; cut it with rank=512"
    ):
        write(Pairs({"a": pair(4, 4, 513)}), tmp_path / "x", "vllm")
    assert not (tmp_path / "x").exists()


# --- the base -------------------------------------------------------------------------------------------------------


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

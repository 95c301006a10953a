"""`veneer export`: a folder that transformers opens to the same outputs, in every number format, or
nothing at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.models import llama, randomise

import veneer
from veneer import files
from veneer.cli.frame import main
from veneer.errors import ConfigError, NotMergeable
from veneer.verbs import export as module
from veneer.verbs.export import export

IDS = torch.arange(3, 35).view(2, 16)
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def saved(folder: Path, model: torch.nn.Module, **adapters: dict[str, object]) -> Path:
    """The model as a base in folder/base, and adapters of random weights beside it."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    try:
        tokenizer.save_pretrained(folder / "base")
    finally:
        tokenizer.chat_template = None  # the one that all tests share
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder / "base")
    for seed, (name, given) in enumerate(adapters.items()):
        own = {"method": "lora", "size": 0.1, **given}
        size = own.pop("size")
        veneer.attach(model, own.pop("method"), name=name, rank=3, **own)
        randomise(model, name, seed=seed, size=size)
        veneer.save(model, folder / name, name)
    veneer.detach(model)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    vocabulary = len(tiny.tokenizer())
    return saved(
        tmp_path_factory.mktemp("export"),
        llama(vocab_size=vocabulary),
        a={},
        b={"method": "dora", "to": ["q_proj", "up_proj"]},
    )


def reference(base: Path, **strengths: float) -> torch.Tensor:
    """The outputs of base and adapters, summed at their strengths, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for name in strengths:
        veneer.load(model, base.parent / name, name)
    veneer.activate(model, strengths)
    with torch.no_grad():
        return model(IDS).logits


def outputs(folder: Path, dtype: object = "auto") -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_folder_does_what_base_and_adapters_do(place, tmp_path, capsys, name, dtype):
    out = tmp_path / "out"
    words = [
        "export",
        str(place / "base"),
        "--adapter",
        f"{place}/a@0.5",
        "--adapter",
        f"{place}/b",
        "--out",
        str(out),
        "--json",
    ]
    assert main([*words, "--dtype", name, "--shard-size", "20KB"]) == 0
    told = json.loads(capsys.readouterr().out)
    tensors = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
    assert {t.dtype for t in tensors.values()} == {dtype} and json.loads((out / "config.json").read_text())[
        "dtype"
    ] == str(dtype)[6:]
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(tensors) and len(set(index.values())) == len(list(out.glob("*.safetensors"))) > 1
    wanted, found = reference(place / "base", a=0.5, b=1.0), outputs(out)
    assert found.dtype == dtype
    # Eight roundings in a row for each of two layers, which no processor adds up in the same order.
    atol = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=atol)
    own = float((outputs(out, torch.float32) - wanted).norm() / (wanted - reference(place / "base")).norm())
    assert (
        told["verdict"]["logit_error"] == pytest.approx(own, rel=0.5, abs=1e-5)
        and not told["verdict"]["lost"]
    )
    assert (
        told["dtype"] == name
        and told["adapters"] == {"a": 0.5, "b": 1.0}
        and told == json.loads((out / "export.json").read_text())
    )


def test_tokenizer_template_and_generation_settings_come_along(place, tmp_path, capsys):
    from transformers import AutoTokenizer, GenerationConfig

    assert (
        main(["export", str(place / "base"), "--adapter", str(place / "a"), "--out", str(tmp_path / "out")])
        == 0
    )
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("kept: rounding took 0.0% of the change") and told[1].startswith(
        "reloaded: outputs differ by "
    )
    assert told[2].startswith(f"saved in {tmp_path}/out: fp32, 146 kB in 1 file")  # as the base is stored
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer.chat_template == TEMPLATE
        and tokenizer("the cat").input_ids == tiny.tokenizer()("the cat").input_ids
    )
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7


@pytest.mark.parametrize("untie", [False, True])
def test_tied_weights_stay_tied_unless_one_of_them_was_adapted(tmp_path, untie):
    model = llama(vocab_size=len(tiny.tokenizer()), tie_word_embeddings=True)
    given = {"to": ["lm_head"], "untie": True} if untie else {}
    base = saved(tmp_path, model, a=given) / "base"
    export(str(base), adapter=[str(tmp_path / "a")], out=str(tmp_path / "out"), dtype="fp32")
    torch.testing.assert_close(outputs(tmp_path / "out"), reference(base, a=1.0))
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == untie


def test_a_mixture_of_experts_keeps_the_names_of_its_files(tmp_path):
    """Mixtral's weights have other names in memory than in files, where each expert has its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=len(tiny.tokenizer()), num_local_experts=4, num_experts_per_tok=2, **sizes)
    )
    base = saved(tmp_path, model.eval(), a={}) / "base"
    export(str(base), adapter=[str(tmp_path / "a")], out=str(tmp_path / "out"), dtype="fp32")
    before, after = (set(load_file(f / "model.safetensors")) for f in (base, tmp_path / "out"))
    assert before == after and any("experts.3.w1" in n for n in after)
    torch.testing.assert_close(outputs(tmp_path / "out"), reference(base, a=1.0))


def test_numbers_that_fp16_has_not_are_refused_by_name(tmp_path):
    model = llama(vocab_size=len(tiny.tokenizer()))
    with torch.no_grad():
        model.model.norm.weight[3] = 70000.0
    base = saved(tmp_path, model, a={}) / "base"
    given = dict(adapter=[str(tmp_path / "a")], out=str(tmp_path / "out"))
    with pytest.raises(NotMergeable) as e:
        export(str(base), **given, dtype="fp16", force=True)
    assert str(e.value) == (
        "1 tensors exceed fp16's range (at most 65504): model.norm.weight (up to 7e+04); use dtype='bf16'"
        " or dtype='fp32'"
    )
    assert e.value.exit_code == 3 and not (tmp_path / "out").exists()
    export(str(base), **given, dtype="bf16")


def test_an_adapter_below_the_format_is_refused_and_nothing_is_left(tmp_path, capsys):
    base = saved(tmp_path, llama(vocab_size=len(tiny.tokenizer())), a={"size": 1e-5}) / "base"
    words = [
        "export",
        str(base),
        "--adapter",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "deep" / "out"),
        "--dtype",
        "bf16",
    ]
    assert main(words) == 3
    assert "the adapter would be lost in the merge: LOST" in capsys.readouterr().err and not list(
        (tmp_path / "deep").glob("*")
    )
    assert main([*words, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"]["lost"]


def test_a_folder_that_reloads_to_something_else_is_not_kept(place, tmp_path, monkeypatch):
    real = module._save

    def spoils(opened, folder, shard_size):
        with torch.no_grad():
            opened.model.model.embed_tokens.weight.mul_(1.2)
        real(opened, folder, shard_size)

    monkeypatch.setattr(module, "_save", spoils)
    given = dict(adapter=[str(place / "a")], out=str(tmp_path / "out"), dtype="fp32")
    with pytest.raises(
        NotMergeable,
        match=r"differs from base and adapters: its outputs are off by 0\.\d+, of which fp32 explains 0\.001",
    ):
        export(str(place / "base"), **given, limit=100)
    with pytest.raises(NotMergeable, match="of its effect"):
        export(str(place / "base"), **given, limit=0.001)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(place, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        export(str(place / "base"), adapter=[str(place / "a")], out=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_with_the_words_is_said_at_once(place, capsys):
    with pytest.raises(ConfigError) as e:
        export(str(place / "base"), out=str(place), shard_size="2 gigs")
    assert str(e.value).splitlines() == [
        "nothing to export: name at least one adapter",
        f"out {place} exists; choose another or remove it",
        "shard_size must be a size with its unit, such as 500MB, got '2 gigs'",
    ]
    assert (
        main(["export", str(place / "gone"), "--adapter", str(place / "a"), "--out", str(place / "out")]) == 2
    )
    assert f"model: the folder {place}/gone does not exist" in capsys.readouterr().err
    assert (
        main(["export", str(place / "base"), "--adapter", str(place / "a"), "--out", "x", "--dtype", "int8"])
        == 2
    )

"""`veneer verify` and `veneer convert` as commands: every way in which an adapter can be wrong, said by a
check."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models

from veneer import methods
from veneer.adapt import combine
from veneer.adapt.attach import attach, detach
from veneer.adapt.attached import adapters, changes
from veneer.adapt.hooks import hang
from veneer.adapt.store import store
from veneer.convert import read
from veneer.errors import ConfigError, FormatError, NotMergeable
from veneer.sites import LeafSite
from veneer.verbs.convert import convert, text
from veneer.verbs.verify import Report, examine, exit_code, verify
from veneer.verbs.verify import text as shown

CLOSE = dict(rtol=0, atol=2e-5)  # logits of size 4 through two layers in float32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the tiny Llama."""
    folder = tmp_path_factory.mktemp("base")
    models.llama().save_pretrained(folder)
    return folder


def saved(folder, method: str = "lora", **options) -> torch.Tensor:
    """A random adapter of ours, and the output with it."""
    model = models.llama()
    attach(model, method, **{"to": ["q_proj", "v_proj"], "rank": 2, **options})
    models.randomise(model)
    store.save(model, folder)
    return models.output(model)


def said(report: Report) -> dict[str, bool | None]:
    return {c.name: c.passed for c in report.checks}


def why(report: Report, name: str) -> str:
    return next(c.text for c in report.checks if c.name == name)


def spoil(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit(folder, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_good_adapter_passes_every_check(tmp_path, method):
    saved(tmp_path / "a", method)
    model = models.llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = examine(model, tmp_path / "a")
    names = ["complete", "targets", "sha256", "unused", "base", "finite", "zero", "norm", "probe", "effect"]
    assert said(report) == dict.fromkeys(names, True) and report.good and exit_code(report) == 0
    assert (
        report.layers == [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]
        and report.dead == []
    )
    assert why(report, "effect").startswith(
        "the outputs move by up to "
    ) and "of the first choices change" in why(report, "effect")
    assert shown(report).endswith("verified, 4 layers") and json.loads(json.dumps(report.as_dict()))["good"]
    assert adapters(model) == [] and all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_folder_of_peft_has_nothing_to_compare_with(tmp_path):
    saved(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    report = examine(models.llama(), tmp_path / "a")
    assert report.good and [n for n, passed in said(report).items() if passed is None] == [
        "sha256",
        "base",
        "norm",
        "probe",
    ]
    assert why(report, "base") == "another program wrote the folder: it has no veneer.json to compare with"
    assert "?    base" in shown(report)


def test_another_base(tmp_path):
    """An adapter on another base of equal shape: PEFT does not warn."""
    saved(tmp_path / "a")
    report = examine(models.llama(seed=1), tmp_path / "a")
    assert said(report)["base"] is False and exit_code(report) == 3
    assert "weights have other values" in why(report, "base") and "NO   base" in shown(report)
    assert said(report)["complete"] and said(report)["effect"]


def test_an_adapter_that_is_not_whole(tmp_path):
    """peft 2566, 2699: "Found missing adapter keys" is a warning there."""
    saved(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    spoil(tmp_path / "a", lambda t: t.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"))
    report = examine(models.llama(), tmp_path / "a")
    assert said(report) == {"complete": False, "targets": True} and report.layers == []
    assert "missing: model.layers.1.self_attn.q_proj.lora_B.weight (32, 2)" in why(report, "complete")


def test_a_tensor_that_belongs_to_no_layer(tmp_path):
    saved(tmp_path / "a")
    spoil(
        tmp_path / "a",
        lambda t: t.update({"base_model.model.model.layers.9.x.lora_A.weight": torch.zeros(1)}),
    )
    report = examine(models.llama(), tmp_path / "a")
    assert {n for n, passed in said(report).items() if passed is False} == {"unused", "sha256"}
    assert "1 tensors belong to no layer" in why(report, "unused") and "was changed" in why(report, "sha256")


def test_a_target_that_is_no_layer(tmp_path):
    """vllm 55193: an adapter that targets no layer of the model serves the base."""
    saved(tmp_path / "a")
    edit(tmp_path / "a", "adapter_config.json", target_modules=["q_proj", "v_proj", "qkv_proj"])
    report = examine(models.llama(), tmp_path / "a")
    assert said(report)["targets"] is False and why(report, "targets") == "no layer is called qkv_proj"
    assert not report.good


def test_dead_layers_are_listed(tmp_path):
    """NeMo Automodel 1755: adapters that load without a warning and then do nothing."""
    saved(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    spoil(
        tmp_path / "a",
        lambda t: t.update(
            {k: torch.zeros_like(v) for k, v in t.items() if "1.self_attn.v_proj.lora_B" in k}
        ),
    )
    report = examine(models.llama(), tmp_path / "a")
    assert (
        said(report)["zero"] is False
        and report.dead == ["model.layers.1.self_attn.v_proj"]
        and said(report)["effect"]
    )
    assert "dead layers: model.layers.1.self_attn.v_proj" in shown(report)


def test_an_adapter_without_any_effect(tmp_path):
    """sentence-transformers PR 3865: the adapter loads, and the outputs are the base's."""
    saved(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    spoil(tmp_path / "a", lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items() if "lora_B" in k}))
    report = examine(models.llama(), tmp_path / "a")
    assert (
        said(report)["effect"] is False
        and why(report, "effect") == "the outputs with it are those of the base, bit for bit"
    )
    assert len(report.dead) == 4


def test_numbers_that_are_not_finite(tmp_path):
    saved(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    spoil(tmp_path / "a", lambda t: next(v for k, v in t.items() if "lora_B" in k).fill_(float("nan")))
    report = examine(models.llama(), tmp_path / "a")
    assert (
        said(report)["finite"] is False
        and said(report)["effect"] is False
        and why(report, "effect") == "the outputs are not finite"
    )


def test_a_scaling_that_was_edited(tmp_path):
    saved(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    edit(tmp_path / "a", "adapter_config.json", lora_alpha=4 * config["lora_alpha"])
    report = examine(models.llama(), tmp_path / "a")
    assert {n for n, passed in said(report).items() if passed is False} == {"norm", "probe"}


def test_verify_finds_the_base_by_itself(tmp_path, base):
    saved(tmp_path / "a")
    edit(tmp_path / "a", "adapter_config.json", base_model_name_or_path=str(base))
    assert verify(str(tmp_path / "a")).good
    with pytest.raises(ConfigError, match="unknown dtype 'float46'; did you mean 'float16'"):
        verify(str(tmp_path / "a"), dtype="float46")


def test_other_models_need_inputs(tmp_path):
    model = models.conv_net()
    attach(model, "lora", to=["first"], rank=2)
    models.randomise(model)
    store.save(model, tmp_path / "a", probe=models.inputs(model))
    detach(model)
    report = examine(model, tmp_path / "a")
    assert said(report)["probe"] and said(report)["effect"] is None and report.good
    assert said(examine(model, tmp_path / "a", inputs=models.inputs(model)))["effect"]


# --- converting from the command line -----------------------------------------------------------------------


def test_convert_and_back(tmp_path, base):
    want = saved(tmp_path / "a", to="all-linear")
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "k"), to="kohya")
    assert (done.dialect, done.layers, done.ranks, done.left_out) == ("peft", 14, [2], [])
    assert json.loads((tmp_path / "k" / "convert.json").read_text()) == done.as_dict()
    assert (
        text(done).splitlines()[0]
        == f"{tmp_path / 'a'}: peft -> kohya in {tmp_path / 'k'}: 14 layers, ranks 2"
    )
    with pytest.raises(ConfigError, match="names match no known module"):
        convert(str(tmp_path / "k"), out=str(tmp_path / "p"))
    assert not (tmp_path / "p").exists()
    convert(str(tmp_path / "k" / "lora.safetensors"), out=str(tmp_path / "p"), model=str(base))
    model = models.llama()
    store.load(model, tmp_path / "p")
    torch.testing.assert_close(models.output(model), want, rtol=0, atol=0)
    (tmp_path / "names.txt").write_text("\n".join(n for n, _ in model.named_modules()))
    convert(str(tmp_path / "k"), out=str(tmp_path / "q"), names=str(tmp_path / "names.txt"))
    assert read(tmp_path / "q").sites.keys() == read(tmp_path / "a").sites.keys()


def test_dora_becomes_plain_lora_on_its_base(tmp_path, base):
    want = saved(tmp_path / "a", "dora", to="all-linear")
    command = rf"veneer convert {tmp_path / 'a'} --to vllm --out OUT --model BASE --rank 64"
    with pytest.raises(
        FormatError,
        match=f"is DoRA, which vllm lacks; make it plain LoRA of a rank of your choice:\n  {command}",
    ):
        convert(str(tmp_path / "a"), out=str(tmp_path / "v"), to="vllm")
    whole = convert(str(tmp_path / "a"), out=str(tmp_path / "v"), to="vllm", model=str(base), energy=1.0)
    assert "kept least, 100.0% of its energy" in whole.notes[0]
    model = models.llama()
    store.load(model, tmp_path / "v")
    torch.testing.assert_close(models.output(model), want, **CLOSE)
    detach(model)
    short = convert(str(tmp_path / "a"), out=str(tmp_path / "w"), to="vllm", model=str(base), rank=4)
    assert short.ranks == [4] and "ranks up to 4 were padded with zeros to 8" in short.notes
    store.load(model, tmp_path / "a", "a")
    combine.to_lora(model, "a", "b", rank=4)
    with_b = {n: p.product() for n, p in read(tmp_path / "w").sites.items()}
    for site, delta in changes(model, "b"):
        torch.testing.assert_close(with_b[site.name], delta.delta(site).detach(), rtol=0, atol=1e-5)


def test_a_start_that_moved_the_base(tmp_path, base):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        models.llama(),
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    )
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_" in n:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    wrapped.save_pretrained(tmp_path / "a")
    want = models.output(wrapped)
    with pytest.raises(
        FormatError, match="changed the base's weights; the original base is needed: give model="
    ):
        convert(str(tmp_path / "a"), out=str(tmp_path / "v"), to="vllm")
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "v"), to="vllm", model=str(base))
    assert (
        done.ranks == [4] and "the start 'pissa' is written out: ranks are twice those trained" in done.notes
    )
    model = models.llama()
    store.load(model, tmp_path / "v")
    torch.testing.assert_close(models.output(model), want, **CLOSE)


def test_cutting_and_rounding_are_said(tmp_path):
    saved(tmp_path / "a")
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "m"), to="mlx-lm", rank=1, dtype="float16")
    assert done.to == "mlx"
    assert done.ranks == [1] and done.notes[0].startswith(
        "truncated to rank <= 1; relative error of a layer's change at most "
    )
    assert done.notes[1] == "factors were converted from float32 to float16"
    assert all(t.dtype == torch.float16 for t in load_file(tmp_path / "m" / "adapters.safetensors").values())


def test_what_is_left_out_is_recorded(tmp_path):
    """vllm 9280, llama.cpp 11554: whole modules beside the pairs, which the other side exits on."""
    saved(tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    spoil(tmp_path / "a", lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}))
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        convert(str(tmp_path / "a"), out=str(tmp_path / "v"), to="vllm")
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "v"), to="vllm", allow=["lm_head.*"])
    assert done.left_out == ["lm_head.weight"] and text(done).endswith("- left out: lm_head.weight")


def test_parts_from_the_command_line(tmp_path):
    saved(tmp_path / "a")
    convert(str(tmp_path / "a"), out=str(tmp_path / "d"), to="diffusers", part="transformer")
    assert read(tmp_path / "d").parts == ("transformer",)
    convert(str(tmp_path / "d"), out=str(tmp_path / "p"))
    assert read(tmp_path / "p").sites.keys() == read(tmp_path / "a").sites.keys()


def test_impossible_conversions(tmp_path, base):
    saved(tmp_path / "a")
    args = dict(out=str(tmp_path / "x"))
    with pytest.raises(ConfigError, match="to: unknown format 'kohay'; did you mean 'kohya'"):
        convert(str(tmp_path / "a"), to="kohay", **args)
    with pytest.raises(ConfigError, match="unknown dtype 'float8'"):
        convert(str(tmp_path / "a"), dtype="float8", **args)
    with pytest.raises(ConfigError, match="exists; choose another or remove it"):
        convert(str(tmp_path / "a"), out=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"names: the file .* does not exist"):
        convert(str(tmp_path / "a"), names="nowhere.txt", **args)
    with pytest.raises(ConfigError, match=r"holds no model: config\.json is missing"):
        convert(str(tmp_path / "a"), model=str(tmp_path), **args)
    assert not (tmp_path / "x").exists()


def test_our_own_layout_has_no_pairs(tmp_path, base):
    """An adapter that PEFT cannot express, here full fine-tuning, is refused with what would do."""
    model = models.llama()
    site = LeafSite("model.norm", model.model.norm)
    hang(model, "default", [(site, methods.build(methods.get("full"), site, {}))])
    models.randomise(model)
    store.save(model, tmp_path / "a")
    assert (tmp_path / "a" / "delta.safetensors").is_file()
    why = (
        "is full in Veneer's own layout: the file has no factors of LoRA; make them on the"
        " base's layers:\n  veneer convert"
    )
    with pytest.raises(FormatError, match=why):
        convert(str(tmp_path / "a"), out=str(tmp_path / "x"), to="vllm")
    with pytest.raises(
        NotMergeable,
        match=r"otherwise than by a matrix, .* or merge it and extract a low-rank one from the merged model",
    ):
        convert(str(tmp_path / "a"), out=str(tmp_path / "x"), to="vllm", model=str(base))

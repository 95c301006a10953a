"""PEFT's `target_parameters`, both ways: both models compute the same, and old layouts are told apart."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import experts

import veneer
from veneer.adapt.attached import changes
from veneer.errors import FormatError

WAYS = [("mixtral", "grouped_mm"), ("qwen3_moe", "eager"), ("deepseek_v3", "batched_mm")]
WAYS += [("gpt_oss", "grouped_mm"), ("gpt_oss", "eager"), ("llama4", "eager")]
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_what_we_save_peft_computes(kind, way, tmp_path):
    model = experts.model(kind, way)
    veneer.attach(model, "lora", to=r".*\.(q_a_proj|q_proj|experts\.\d+\.\w+)", rank=3, alpha=5)
    experts.shake(model)
    ours = experts.logits(model)
    veneer.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(NAMES)
    theirs = peft.PeftModel.from_pretrained(experts.model(kind, way), tmp_path / "a").eval()
    torch.testing.assert_close(experts.logits(theirs), ours, rtol=1e-4, atol=1e-5)
    again = veneer.load(experts.model(kind, way), tmp_path / "a")
    for (s, a), (t, b) in zip(changes(model, "default"), changes(again, "default"), strict=True):
        assert s.name == t.name
        torch.testing.assert_close(s.weight() + b.delta(t), t.weight() + a.delta(s), rtol=0, atol=1e-7)


def trained(kind, way, names, tmp_path, rank=3):
    """Returns PEFT's logits of an adapter with numbers everywhere, and its folder."""
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=[], target_parameters=names)
    model = peft.get_peft_model(experts.model(kind, way), config).eval()
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "theirs")
    return experts.logits(model), tmp_path / "theirs"


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], NAMES[:1], NAMES[1:]])
@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_what_peft_saves_we_compute(kind, way, names, tmp_path):
    theirs, folder = trained(kind, way, names, tmp_path)
    model = veneer.load(experts.model(kind, way), folder)
    torch.testing.assert_close(experts.logits(model), theirs, rtol=1e-4, atol=2e-5)
    veneer.merge(model)
    torch.testing.assert_close(experts.logits(model), theirs, rtol=1e-4, atol=5e-5)


def old_file(folder, kind, version):
    """Rewrites a file of today as PEFT before 0.19.1 wrote it: B' for A and A' for B, expert by expert."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [k for k in tensors if k.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        A, B = tensors[key].unflatten(0, (4, -1)), tensors[other].unflatten(1, (-1, 4))
        tensors[key] = B.permute(2, 1, 0).flatten(0, 1).contiguous()  # (E r, out)
        tensors[other] = A.permute(2, 1, 0).flatten(1).contiguous()  # (in, r E)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["peft_version"] = version
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "version"), [("mixtral", "0.18.1"), ("mixtral", None), ("gpt_oss", "0.19.0")]
)
def test_files_of_older_versions_are_told_by_their_shapes(kind, version, tmp_path):
    theirs, folder = trained(kind, "eager", NAMES, tmp_path)
    old_file(folder, kind, version)
    loaded = veneer.load(experts.model(kind, "eager"), folder)
    torch.testing.assert_close(experts.logits(loaded), theirs, rtol=1e-4, atol=2e-5)


def square(kind):
    """A model whose experts' down_proj is square: only the version tells its layout."""
    torch.manual_seed(0)
    whole, config, settings = experts.KINDS[kind]
    settings = {**experts.SIZES, **settings, "intermediate_size": experts.SIZES["hidden_size"]}
    return whole._from_config(config(**settings), experts_implementation="eager").eval()


@pytest.mark.parametrize(
    ("kind", "version", "flipped"),
    [
        ("mixtral", "0.18.1", True),
        ("mixtral", "0.19.0", True),
        ("mixtral", "0.19", True),
        ("mixtral", "0.19.1", False),
        ("mixtral", "0.21.0.dev0", False),
        ("gpt_oss", "0.18.0", False),
        ("gpt_oss", "0.19.0", True),
        ("gpt_oss", "0.19", True),
        ("gpt_oss", "0.19.1", False),
    ],
)
def test_square_experts_are_read_by_the_version(kind, version, flipped, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=NAMES[1:])
    model = peft.get_peft_model(square(kind), config).eval()
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    theirs = experts.logits(model)
    if flipped:
        old_file(tmp_path, kind, version)
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"peft_version": version}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    torch.testing.assert_close(
        experts.logits(veneer.load(square(kind), tmp_path)), theirs, rtol=1e-4, atol=2e-5
    )
    settings["peft_version"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match=r"its matrices are square, and PEFT before 0\.19\.1"):
        veneer.load(square(kind), tmp_path)


def test_files_that_do_not_fit_are_named(tmp_path):
    _, folder = trained("mixtral", "eager", NAMES, tmp_path)
    with pytest.raises(
        FormatError, match=r"wrong shape: model.layers.0.mlp.experts.gate_up_proj \(4, 32, 32\)"
    ):
        veneer.load(experts.model("qwen3_moe"), folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_parameters": [*NAMES, "experts.w9"]}))
    with pytest.raises(FormatError, match=r"names 'experts.w9', which no parameter"):
        veneer.load(experts.model("mixtral"), folder)
    path.write_text(json.dumps(config | {"target_parameters": [*NAMES, "mlp.gate.weight"]}))
    with pytest.raises(
        FormatError, match=r"mlp.gate.weight \(4, 32\) must be fused experts of a known layout"
    ):
        veneer.load(experts.model("mixtral"), folder)


@pytest.mark.parametrize("options", [{"rank_pattern": {r"0\.down_proj": 4}}, {"init": "pissa"}])
def test_what_peft_lacks_is_saved_in_our_own_layout(options, tmp_path):
    model = experts.model("mixtral")
    veneer.attach(model, "lora", to="experts", rank=2, **options)
    experts.shake(model)
    veneer.save(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = veneer.load(experts.model("mixtral"), tmp_path)
    torch.testing.assert_close(experts.logits(loaded), experts.logits(model), rtol=1e-4, atol=1e-5)

"""Complaints about adapters saved wrong or loaded dead (docs/complaints.md), each test named after the
thread it answers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import experts, models, tiny
from support.resuming import Killed, killed_at
from torch import nn

import veneer
from veneer.adapt import combine
from veneer.adapt.attached import changes
from veneer.errors import ConfigError, FormatError, SiteError
from veneer.runs.fit import fit
from veneer.train.folder import checkpoint
from veneer.train.run import Run
from veneer.verbs.verify import examine

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LEAD = "base_model.model."


@pytest.fixture
def folder(tmp_path):
    """An adapter as PEFT writes it: without our manifest."""
    model = veneer.attach(models.llama(), "lora", to=["q_proj", "v_proj"], rank=2)
    models.randomise(model)
    veneer.save(model, tmp_path / "a")
    (tmp_path / "a" / "veneer.json").unlink()
    return tmp_path / "a"


def edit(folder, **changed) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def spoil(folder, change) -> None:
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS)


def refusal(folder, model: nn.Module | None = None) -> str:
    model = model or models.llama()
    with pytest.raises(FormatError) as e:
        veneer.load(model, folder)
    assert not veneer.adapters(model)
    return str(e.value)


def test_vllm_55193_an_adapter_that_targets_no_layer_is_refused(folder):
    edit(folder, target_modules=["qkv_proj"])
    assert "no layer of the model matches target_modules=['qkv_proj']" in refusal(folder)
    edit(folder, target_modules=["q_proj", "v_proj", "qkv_proj"])
    told = refusal(folder)
    assert (
        "target_modules names qkv_proj, which no layer of the model is called: nothing was trained there"
        in told
    )
    assert "allow=('targets',)" in told
    assert veneer.adapters(veneer.load(models.llama(), folder, allow="targets")) == ["default"]


def test_vllm_41754_names_with_another_prefix_are_refused_from_both_sides(folder):
    """As Gemma's text model inside a multimodal one: every tensor has a name, and no layer has it."""
    spoil(folder, lambda t: {k.replace("model.layers", "language_model.layers"): v for k, v in t.items()})
    told = refusal(folder)
    assert "missing: model.layers.0.self_attn.q_proj.lora_A.weight (2, 32)" in told
    assert "8 tensors belong to no layer: base_model.model.language_model.layers." in told.replace(
        f"{LEAD}model.l", f"{LEAD}l"
    )


def test_peft_2566_a_missing_tensor_is_an_error_and_no_warning(folder):
    spoil(folder, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj.lora_B" not in k})
    assert "missing: model.layers.1.self_attn.q_proj.lora_B.weight (32, 2)" in refusal(folder)


def test_sentence_transformers_3865_an_adapter_without_effect_is_not_loaded(folder):
    spoil(folder, lambda t: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in t.items()})
    assert "the change is zero at 4 of 4 layers, which have learned nothing" in refusal(folder)
    assert not examine(models.llama(), folder).good


class Reader(nn.Module):
    """A layer whose owner multiplies by its weight itself, as fused kernels and experts do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x):
        return x @ self.inner.weight.mT


def read_directly() -> nn.Module:
    model = models.llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Reader(layer.self_attn.q_proj)
    return model


def test_automodel_1755_layers_that_are_never_called_are_noticed_at_loading(folder):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    spoil(folder, lambda t: {k.replace("q_proj.", "q_proj.inner."): v for k, v in t.items() if "q_proj" in k})
    edit(folder, target_modules=[f"{n}.inner" for n in names])
    told = refusal(folder, read_directly())
    assert "outputs with it are those of the base, bit for bit; check that the model calls these" in told
    assert f"reads the weights of {names[0]}.inner, {names[1]}.inner itself and does not call" in told
    model = veneer.load(read_directly(), folder, allow="zero", trainable=True).train()
    with pytest.raises(
        SiteError, match=r"2 adapted layers were never called in the first training step: model\.layers\.0"
    ):
        model(**models.inputs(model))


def test_unsloth_6930_factors_of_fused_experts_keep_their_order(tmp_path):
    """A's rows run expert by expert, B's columns rank by rank; with two ranks a mistake shows."""
    model = experts.shake(veneer.attach(experts.model("mixtral"), "lora", to=["down_proj"], rank=2, alpha=2))
    veneer.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lead = "base_model.model.model.layers.1.mlp.experts.lora_"
    A, B = tensors[f"{lead}A.weight"], tensors[f"{lead}B.weight"]
    base = experts.model("mixtral").model.layers[1].mlp.experts.down_proj
    veneer.merge(model)
    for e in range(4):
        change = sum(torch.outer(B[:, k * 4 + e], A[e * 2 + k]) for k in range(2))
        merged = model.model.layers[1].mlp.experts.down_proj[e]
        torch.testing.assert_close(merged, base[e] + change, rtol=1e-5, atol=1e-6)


def test_lerobot_3459_resuming_goes_on_with_the_trained_weights(tmp_path):
    given = {**tiny.settings(tmp_path, steps=6, save_every=2, eval_every=3)}
    whole = fit(Run.from_dict({**given, "out": str(tmp_path / "whole")}), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 4)
        with pytest.raises(Killed):
            fit(Run.from_dict(given), progress=False)
    resumed = fit(Run.from_dict({**given, "resume": True}), progress=False)
    for name, t in load_file(whole.adapter / TENSORS).items():
        assert torch.equal(t, load_file(resumed.adapter / TENSORS)[name]), name
    model = veneer.load(models.llama(vocab_size=len(tiny.tokenizer())), whole.adapter, allow="base")
    with pytest.raises(
        ConfigError, match="an adapter called 'default' is already attached; detach it or choose another name"
    ):
        veneer.attach(model, "lora", rank=4)  # wrapping it again would train a new one


def test_peft_2892_an_adapter_of_empty_tensors_is_not_saved(tmp_path):
    """As a partitioned parameter looks from one process: no number is in it."""
    model = veneer.attach(models.llama(), "lora", to=["q_proj"], rank=2)
    models.randomise(model)
    for _, delta in changes(model, "default"):
        delta.B.data = torch.empty(0)
    with pytest.raises(
        FormatError,
        match=r"was not saved:\n- 2 parameters are empty: model\.layers\.0\.self_attn\.q_proj\.B, .* gather",
    ):
        veneer.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_peft_2892_a_file_of_forty_bytes_is_not_loaded(folder):
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:40])
    assert "is not a whole safetensors file" in refusal(folder)
    save_file({}, folder / TENSORS)
    assert refusal(folder).count("missing: ") == 8


def test_peft_1932_what_is_said_is_short_and_true(folder):
    spoil(folder, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj.lora_B" not in k})
    told = refusal(folder)
    assert len(told.splitlines()) == 2 and "embed_tokens" not in told and "norm" not in told


def test_dreamzero_90_checkpoints_hold_no_weight_of_the_base(tmp_path):
    result = fit(Run.from_dict(tiny.settings(tmp_path, steps=2)), progress=False)
    newest, _ = checkpoint.newest(result.folder / "checkpoints")
    trained = result.metrics["trainable_parameters"]
    assert newest is not None
    numbers = sum(t.numel() for t in newest.tensors.values() if t.is_floating_point())
    assert trained < numbers < 3.1 * trained  # the factors, two moments of each, and where the optimiser is


def test_peft_3737_a_combination_of_mixed_ranks_comes_back(tmp_path):
    import peft

    model = models.llama()
    veneer.attach(model, "lora", to=["q_proj", "v_proj"], rank=3, name="a")
    veneer.attach(
        model, "lora", to=["q_proj", "up_proj"], rank=2, rank_pattern={"layers.1.mlp.up_proj": 5}, name="b"
    )
    for seed, name in enumerate("ab"):
        models.randomise(model, name, seed=seed)
    combine.combine(model, {"a": 0.7, "b": -0.3}, "both")
    with veneer.using(model, "both"):
        wanted = models.output(model)
    veneer.save(model, tmp_path / "both", "both")
    assert json.loads((tmp_path / "both" / CONFIG).read_text())["rank_pattern"]
    again = veneer.load(models.llama(), tmp_path / "both")
    torch.testing.assert_close(models.output(again), wanted, rtol=0, atol=2e-5)
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "both")
    torch.testing.assert_close(models.output(theirs), wanted, rtol=0, atol=2e-5)
